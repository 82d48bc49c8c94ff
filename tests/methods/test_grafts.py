"""Grafted models are what their weights say, and curves count what they answer."""

import copy

import pytest
import torch

from tests.methods.gains import changed, fine_tuned, without_note_and_key
from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.random_models import random_model, random_prompts
from tests.test_results import same
from tl_entity import (
    Evaluation,
    Head,
    InputError,
    Unit,
    evaluate,
    graft,
    graft_curve,
    load_model,
    weight_shares,
)
from tl_entity.methods.grafts import BY_SHARE, BY_SIZE, RANDOM, GraftCurve
from tl_entity.methods.weight_units import units_of

SHAPE = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
BASE = random_model(**SHAPE)
TUNED = fine_tuned(BASE)
ALL = [unit for name, weight in BASE.named_parameters() for unit in units_of(name, weight)]
PROMPTS = random_prompts(5, 9)


def logits(model) -> torch.Tensor:
    return model(PROMPTS.tokens, attention_mask=PROMPTS.attention_mask)


def test_with_all_units_it_is_the_tuned_model_and_with_none_the_base() -> None:
    assert torch.equal(logits(graft(BASE, TUNED, ALL)), logits(TUNED))
    assert torch.equal(logits(graft(BASE, TUNED, [])), logits(BASE))
    assert torch.equal(logits(graft(TUNED, BASE, ALL)), logits(BASE))
    assert not torch.equal(logits(BASE), logits(TUNED))


EVERY = slice(None)
MLP = [f"blocks.0.mlp.{name}" for name in ("W_gate", "W_in", "W_out", "b_in", "b_out")]
ENDS = ["embed.W_E", "unembed.W_U", "unembed.b_U"]
EDITS = [
    ([Unit("q", 1, 2)], {"blocks.1.attn.W_Q": 2}),
    ([Unit("o", 0, 3), Unit("o", 0, 0)], {"blocks.0.attn.W_O": [0, 3]}),
    ([Unit("k", 1, 1), Unit("b_v", 0, 0)], {"blocks.1.attn._W_K": 1, "blocks.0.attn._b_V": 0}),
    ([Unit("out", 1)], {"blocks.1.mlp.W_out": EVERY}),
    ([Unit("mlp", 0)], dict.fromkeys(MLP, EVERY)),
    ([Unit("ln1", 1), Unit("ln_final")], {"blocks.1.ln1.w": EVERY, "ln_final.w": EVERY}),
    ([Unit("embed"), Unit("unembed"), Unit("b_u")], dict.fromkeys(ENDS, EVERY)),
]


@pytest.mark.parametrize(("units", "edits"), EDITS)
def test_just_the_units_weights_are_the_tuned_models(units, edits) -> None:
    expected = copy.deepcopy(BASE)
    for name, rows in edits.items():
        expected.get_parameter(name).data[rows] = TUNED.get_parameter(name)[rows]
    grafted = graft(BASE, TUNED, units)
    for (name, ours), theirs in zip(grafted.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(logits(grafted), logits(expected))


def test_what_no_unit_touches_is_shared_and_no_model_is_changed() -> None:
    before = [(p, p.clone()) for model in (BASE, TUNED) for p in model.parameters()]
    grafted = graft(BASE, TUNED, [Unit("q", 1, 2), Unit("gate", 0)])
    assert grafted.blocks[0].mlp.W_out is BASE.blocks[0].mlp.W_out
    assert grafted.blocks[0].mlp.W_gate.data_ptr() == TUNED.blocks[0].mlp.W_gate.data_ptr()
    grafted.blocks[1].attn.W_Q.data.zero_()
    grafted.add_hook("hook_embed", lambda x, hook: 0 * x)
    grafted.cfg.n_ctx = 3
    now = [p for model in (BASE, TUNED) for p in model.parameters()]
    assert all(p is q and torch.equal(value, q) for (p, value), q in zip(before, now, strict=True))
    assert BASE.cfg.n_ctx == 32 and not BASE.hook_embed.fwd_hooks


def test_a_graft_of_a_shipped_model_answers_as_the_model_it_was_made_of() -> None:
    base, tuned = (load_model(f"default-{name}", device="cpu") for name in ("base", "tuned"))
    grafted = graft(base, tuned, [Unit("q", 0, 0)])
    assert grafted.tokenizer is base.tokenizer
    text = grafted.to_tokens("The apple is in Box E")
    assert not torch.equal(grafted(text), base(text))
    whole = [unit for name, weight in base.named_parameters() for unit in units_of(name, weight)]
    assert torch.equal(graft(base, tuned, whole)(text), tuned(text))


@pytest.mark.parametrize(
    "unit", [Unit("q", 2, 0), Unit("q", 0, 4), Unit("k", 0, 2), Unit("mlp", 5), Unit("z", 0, 0)]
)
def test_units_that_do_not_exist_are_refused(unit: Unit) -> None:
    with pytest.raises(InputError, match="no unit"):
        graft(BASE, TUNED, [unit])


def test_models_that_cannot_be_grafted_are_refused() -> None:
    with pytest.raises(InputError, match="n_layers"):
        graft(BASE, random_model(n_layers=3, n_kv_heads=2), [])
    bridge = load_model("default-base", backend="bridge", device="cpu")
    with pytest.raises(InputError, match="TransformerBridge"):
        graft(bridge, bridge, [])


@pytest.fixture(scope="module")
def planted() -> GraftCurve:
    """The task learnt by two heads, beside noise on heads that have nothing to do with it."""
    base = without_note_and_key()
    tuned = changed(
        base,
        {
            "blocks.0.attn.W_O": planted_model().blocks[0].attn.W_O - base.blocks[0].attn.W_O,
            "blocks.1.attn.W_K": planted_model().blocks[1].attn.W_K - base.blocks[1].attn.W_K,
        },
    )
    noisy = changed(tuned, {"blocks.0.attn.W_Q": None, "blocks.1.attn.W_V": [0, 1, 3]})
    shares = weight_shares(base, noisy, planted_pairs(24, 0))
    assert set(shares.top(2)) == {Unit("o", *NOTE), Unit("k", *COPY)}
    return graft_curve(
        base,
        noisy,
        planted_pairs(60, 1).clean,
        shares,
        sizes=[2, 1, 5],
        orders={"wrong": [Unit("q", 0, 0), Unit("q", 0, 1)]},
        seeds=[4],
    )


def test_two_units_hold_a_planted_gain_and_neither_alone_does(planted: GraftCurve) -> None:
    assert planted.base.accuracy < 0.5 < 0.9 < planted.tuned.accuracy
    one, two, five = planted.of(BY_SHARE)
    assert [len(entry.units) for entry in (one, two, five)] == [1, 2, 5]
    assert one.recovered.recovered < 0.3
    assert two.recovered.recovered >= 0.9 and two.remaining.recovered < 0.3
    # Either one is missed: without it the gain is gone.
    assert one.remaining.recovered < 0.3
    assert planted.smallest() is two
    assert planted.smallest(removed=True) is not None
    assert "2 units have 0.9 of the gain" in str(planted)
    assert planted.smallest(order="wrong") is None
    assert all(entry.remaining.recovered > 0.9 for entry in planted.of("wrong"))
    assert planted.orders == (BY_SHARE, BY_SIZE, "wrong", f"{RANDOM} 4")
    assert [len(entry.units) for entry in planted.of("wrong")] == [1, 2]


def test_every_entry_is_the_evaluation_of_its_grafts() -> None:
    held_out = random_prompts(30, 9, seed=5)
    # Answers of which the two models know some.
    held_out.answers[:20] = evaluate(TUNED, held_out).predicted[:20]
    held_out.answers[20:] = evaluate(BASE, held_out).predicted[20:]
    shares = weight_shares(BASE, TUNED, PROMPTS)
    runs: list[int] = []
    curve = graft_curve(
        BASE, TUNED, held_out, shares, sizes=[3, 20], seeds=[0], progress=runs.append
    )
    assert sum(runs) == 30 * (2 + 2 * 2 * 3)
    whole = curve.tuned.accuracy - curve.base.accuracy
    for entry in curve.entries:
        rest = [unit for unit in shares.units if unit not in entry.units]
        assert same(entry.grafted, evaluate(graft(BASE, TUNED, entry.units), held_out))
        assert same(entry.removed, evaluate(graft(BASE, TUNED, rest), held_out))
        gain = entry.grafted.accuracy - curve.base.accuracy
        assert entry.recovered.recovered == pytest.approx(gain / whole)
        assert entry.share == pytest.approx(sum(map(shares.share, entry.units)) / shares.gain)
    assert [entry.units for entry in curve.of(BY_SHARE)] == [shares.top(3), shares.top(20)]
    by_size = curve.of(BY_SIZE)[0].units
    sizes = dict(zip(shares.units, shares.sizes.tolist(), strict=True))
    assert min(sizes[u] for u in by_size) >= max(v for u, v in sizes.items() if u not in by_size)
    (three, twenty) = curve.of(f"{RANDOM} 0")
    for drawn, like in ((three, shares.top(3)), (twenty, shares.top(20))):
        assert sorted((u.layer or -1, u.kind) for u in drawn.units) == sorted(
            (u.layer or -1, u.kind) for u in like
        )


def test_a_curve_comes_back_and_shows_itself(planted: GraftCurve, tmp_path) -> None:
    planted.save(tmp_path / "curve")
    assert same(GraftCurve.load(tmp_path / "curve"), planted)
    assert "\n" not in repr(planted) and 20 < len(str(planted)) < 200
    rows = planted.to_dataframe().set_index(["order", "n_units"])
    two = planted.of(BY_SHARE)[1]
    assert rows.loc[(BY_SHARE, 2), "alone_accuracy"] == two.grafted.accuracy
    assert rows.loc[(BY_SHARE, 2), "without_high"] == two.removed.interval.high
    lines = {trace.name: trace for trace in planted.plot().data if trace.name}
    assert list(lines[f"{BY_SHARE}, alone"].x) == [1, 2, 5]
    assert lines[f"{BY_SHARE}, the rest"].y[1] == two.removed.accuracy
    assert planted._repr_html_().count("<table") == 1


def test_prompts_of_the_shares_are_refused() -> None:
    shares = weight_shares(BASE, TUNED, PROMPTS)
    held_out = random_prompts(4, 12, seed=9)
    padded = PROMPTS[1:2]  # the same prompt, padded otherwise
    with pytest.raises(InputError, match="1 of the prompts"):
        graft_curve(BASE, TUNED, padded, shares, sizes=[1])
    with pytest.raises(InputError, match="from 1 to"):
        graft_curve(BASE, TUNED, held_out, shares, sizes=[0, 2])
    with pytest.raises(InputError, match="no unit"):
        graft_curve(BASE, TUNED, held_out, shares, sizes=[1], orders={"own": [Unit("q", 9, 9)]})


def test_a_tuned_model_that_gains_nothing_has_no_smallest_graft(planted: GraftCurve) -> None:
    nothing = torch.zeros(60, dtype=torch.bool)
    tuned = Evaluation(planted.tuned.predicted, nothing, planted.tuned.answer_log_probability)
    worse = GraftCurve(planted.base, tuned, planted.entries, planted.n_units)
    assert worse.smallest() is None


def test_heads_units_are_an_order_of_their_own() -> None:
    shares = weight_shares(BASE, TUNED, PROMPTS)
    found = shares.units_of([Head(1, 3), Head(1, 2)])
    own = {Unit(kind, 1, 3) for kind in ("q", "o", "b_q")}
    kv = {Unit(kind, 1, 1) for kind in ("k", "v", "b_k", "b_v")}
    assert set(found[:7]) == own | kv
    assert set(found[7:]) == {Unit(kind, 1, 2) for kind in ("q", "o", "b_q")}
