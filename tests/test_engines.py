"""The exact engine against plain hooks, on random models of every shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_models import random_model, random_pairs
from tl_entity import Head, InputError, Metric, PairBatch, path_patch, path_patch_mlps
from tl_entity.exact.path_patching import patched_values
from tl_entity.hooks.path_patching import Path
from tl_entity.hooks.run import answer_logits
from tl_entity.metrics import LOG_PROBABILITY, LOGIT_DIFFERENCE, TARGET_LOGIT

HEAD_INPUTS = ["q", "k", "v"]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    n_kv_heads = draw(st.sampled_from([1, 2, 3]))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 4))
    heads = st.builds(Head, st.integers(0, n_layers - 1), st.integers(0, n_heads - 1))
    receivers = draw(st.none() | st.lists(heads, max_size=4, unique=True))
    return {
        "model": {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": draw(st.sampled_from([2, 4, 10])),
            "d_model": draw(st.sampled_from([12, 24])),
            "seed": draw(st.integers(0, 3)),
        },
        "pairs": {
            "n_pairs": draw(st.integers(1, 4)),
            "n_tokens": draw(st.integers(5, 9)),
            "left": draw(st.booleans()),
            "seed": draw(st.integers(0, 5)),
        },
        "patch": {
            "position": draw(st.sampled_from(["last", "place", "early"])),
            "receivers": receivers,
            "receiver_input": None if receivers is None else draw(st.sampled_from(HEAD_INPUTS)),
        },
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_engines_agree_in_float64(case: dict) -> None:
    model = random_model(**case["model"])
    pairs = random_pairs(**case["pairs"])
    exact = path_patch(model, pairs, **case["patch"], engine="exact")
    hooks = path_patch(model, pairs, **case["patch"], engine="hooks")
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_engines_agree_in_float32(case: dict) -> None:
    model = random_model(**case["model"], dtype=torch.float32)
    pairs = random_pairs(**case["pairs"])
    exact = path_patch(model, pairs, **case["patch"], engine="exact")
    hooks = path_patch(model, pairs, **case["patch"], engine="hooks")
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("receiver_input", [None, "q", "k", "v"])
def test_chunks_do_not_matter(receiver_input: str | None) -> None:
    model, pairs = random_model(n_kv_heads=2), random_pairs(5)
    how = {
        "position": "last" if receiver_input is None else "place",
        "receivers": None if receiver_input is None else [Head(1, 1), Head(2, 2)],
        "receiver_input": receiver_input,
    }
    inputs = None if receiver_input is None else {receiver_input: how["receivers"]}
    path = Path(position=how["position"], receivers=inputs)
    _, whole = patched_values(model, pairs, path)
    for chunked in ({"batch_size": 2}, {"memory": 1}, {"batch_size": 1, "memory": 30_000}):
        _, parts = patched_values(model, pairs, path, **chunked)
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)
    parts = path_patch(model, pairs, **how, engine="hooks", batch_size=2).per_example
    torch.testing.assert_close(
        parts, path_patch(model, pairs, **how, engine="hooks").per_example, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("receiver_input", [None, "q", "k", "v"])
def test_patching_a_run_with_itself_changes_exactly_nothing(
    engine: str, receiver_input: str | None
) -> None:
    clean = random_pairs().clean
    scores = path_patch(
        random_model(n_kv_heads=2),
        PairBatch(clean, clean, clean.answers),
        position="last",
        receivers=None if receiver_input is None else [Head(2, 0), Head(1, 3)],
        receiver_input=receiver_input,
        engine=engine,
    )
    assert torch.equal(scores.per_example, torch.zeros_like(scores.per_example))


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("receiver_input", ["q", "k", "v"])
def test_heads_that_cannot_reach_the_receivers_score_exactly_zero(
    engine: str, receiver_input: str
) -> None:
    scores = path_patch(
        random_model(4),
        random_pairs(),
        position="last",
        receivers=[Head(1, 0), Head(2, 3)],
        receiver_input=receiver_input,
        engine=engine,
    )
    assert torch.equal(scores.per_example[2:], torch.zeros_like(scores.per_example[2:]))
    assert (scores.per_example[:2].abs().amax(-1) > 1e-6).all()
    assert scores.top_layer == 2
    assert {head.layer for head in scores.ranked()} == {0, 1}


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_nothing_crosses_positions_while_attention_is_held(engine: str) -> None:
    pairs = random_pairs()
    scores = path_patch(random_model(), pairs, position="place", engine=engine).per_example
    at_last = pairs.clean.position("place") == pairs.clean.position("last")
    assert torch.equal(scores[..., ~at_last], torch.zeros_like(scores[..., ~at_last]))


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("receivers", [[], [Head(0, 1)]])
def test_receivers_without_senders_below_them_score_zero(engine: str, receivers: list) -> None:
    scores = path_patch(
        random_model(),
        random_pairs(),
        position="last",
        receivers=receivers,
        receiver_input="v",
        engine=engine,
    )
    assert torch.equal(scores.per_example, torch.zeros_like(scores.per_example))
    assert scores.ranked() == []


def test_progress_counts_every_run_once() -> None:
    for engine in ("exact", "hooks"):
        done: list[int] = []
        path_patch(
            random_model(),
            random_pairs(5),
            receivers=[Head(1, 0)],
            receiver_input="q",
            engine=engine,
            batch_size=2,
            progress=done.append,
        )
        assert sum(done) == 3 * 4 * 5, engine


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positional_embedding_type": "standard"}, "not rotary"),
        ({"parallel_attn_mlp": True}, "parallel"),
        ({"attn_scores_soft_cap": 30.0}, "scores are capped"),
        ({"output_logits_soft_cap": 30.0}, "logits are capped"),
        ({"use_normalization_before_and_after": True}, "after attention"),
    ],
)
def test_what_cannot_be_recomputed_exactly_is_refused(changes: dict, reason: str) -> None:
    model = random_model(**changes)
    with pytest.raises(InputError, match=f'{reason}.*engine="hooks"'):
        path_patch(model, random_pairs())


def test_lasting_hooks_are_refused_by_the_exact_engine() -> None:
    model = random_model()
    model.add_perma_hook("blocks.0.attn.hook_z", lambda z, hook: z)
    with pytest.raises(InputError, match="attached to it for good"):
        path_patch(model, random_pairs())


def test_models_with_plain_mlps_and_layer_norm_are_exact_too() -> None:
    model = random_model(gated_mlp=False, act_fn="gelu", normalization_type="LN", final_rms=False)
    pairs = random_pairs()
    how = {"position": "place", "receivers": [Head(2, 1)], "receiver_input": "v"}
    exact, hooks = (path_patch(model, pairs, **how, engine=e) for e in ("exact", "hooks"))
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-9, rtol=1e-9)


def test_bad_questions_are_refused() -> None:
    model, pairs = random_model(), random_pairs()
    with pytest.raises(InputError, match="go together"):
        path_patch(model, pairs, receivers=[Head(0, 0)])
    with pytest.raises(InputError, match="go together"):
        path_patch(model, pairs, receiver_input="q")
    with pytest.raises(InputError, match="no head L7H0"):
        path_patch(model, pairs, receivers=[Head(7, 0)], receiver_input="q")
    with pytest.raises(InputError, match="no position 'nowhere'"):
        path_patch(model, pairs, position="nowhere")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_engines_agree_on_mlps_as_senders(case: dict) -> None:
    model = random_model(**case["model"])
    pairs = random_pairs(**case["pairs"])
    exact = path_patch_mlps(model, pairs, **case["patch"], engine="exact")
    hooks = path_patch_mlps(model, pairs, **case["patch"], engine="hooks")
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-9, rtol=1e-9)
    assert exact.scores.shape == (case["model"]["n_layers"],)


def test_an_mlp_that_matters_is_seen_and_one_that_cannot_reach_scores_zero() -> None:
    model, pairs = random_model(), random_pairs()
    logits = path_patch_mlps(model, pairs)
    assert (logits.per_example.abs().amax(-1) > 1e-3).all()
    to_head = path_patch_mlps(model, pairs, receivers=[Head(1, 2)], receiver_input="q")
    assert to_head.per_example[0].abs().max() > 1e-3
    assert torch.equal(to_head.per_example[1:], torch.zeros_like(to_head.per_example[1:]))
    itself = PairBatch(pairs.clean, pairs.clean, pairs.targets)
    for engine in ("exact", "hooks"):
        nothing = path_patch_mlps(model, itself, engine=engine)
        assert torch.equal(nothing.per_example, torch.zeros_like(nothing.per_example))


def with_foils(pairs: PairBatch) -> PairBatch:
    return PairBatch(pairs.clean, pairs.corrupt, pairs.targets, foils=(pairs.targets + 3) % 20)


def target_and_foil(pairs: PairBatch) -> torch.Tensor:
    assert pairs.foils is not None
    return torch.stack([pairs.targets, pairs.foils], -1)


LARGEST_LOGIT = Metric("largest logit", lambda logits, pairs: logits.max(-1).values)
LOG_ODDS = Metric(
    "log odds",
    lambda found, pairs: found[..., 0] - (-found[..., 1].exp()).log1p(),
    tokens=target_and_foil,
    log_probabilities=True,
)
"""Of the target's probability against everything but the foil: needs both normalised."""


@pytest.mark.parametrize("receiver_input", [None, "q", "v"])
@pytest.mark.parametrize(
    "metric",
    [LOG_PROBABILITY, LOGIT_DIFFERENCE, TARGET_LOGIT, LARGEST_LOGIT, LOG_ODDS],
    ids=lambda metric: metric.name,
)
def test_engines_agree_on_every_metric(metric: Metric, receiver_input: str | None) -> None:
    model, pairs = random_model(n_kv_heads=2), with_foils(random_pairs())
    receivers = None if receiver_input is None else [Head(1, 1), Head(2, 2)]
    how = {"receivers": receivers, "receiver_input": receiver_input, "metric": metric}
    exact = path_patch(model, pairs, **how, batch_size=3)
    hooks = path_patch(model, pairs, **how, engine="hooks")
    assert hooks.per_example.abs().max() > 1e-3
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-9, rtol=1e-9)
    assert exact.metric == metric.name


def test_a_logit_difference_by_hand() -> None:
    """The clean value is that of a plain run, and a score the difference of two of them."""
    model, pairs = random_model(), with_foils(random_pairs())
    found = path_patch(model, pairs, metric=LOGIT_DIFFERENCE)
    logits = answer_logits(model, pairs.clean)
    rows = torch.arange(len(pairs))
    expected = logits[rows, pairs.targets] - logits[rows, pairs.foils]
    torch.testing.assert_close(found.clean_values, expected)
    with pytest.raises(InputError, match="foils"):
        path_patch(model, random_pairs(), metric=LOGIT_DIFFERENCE)
