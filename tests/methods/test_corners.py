"""The four corners against grafted models, both engines, and where the answer is known."""

import pytest
import torch

from tests.methods.gains import fine_tuned, without_note_and_key
from tests.methods.planted import planted_model, planted_pairs
from tests.random_models import random_model, random_pairs, random_prompts
from tests.test_results import same
from tl_entity import InputError, PairBatch, Unit, evaluate, four_corners, graft, load_model
from tl_entity.hooks import answer_logits, hook_point, record
from tl_entity.methods.corners import FourCorners
from tl_entity.methods.weight_units import units_of
from tl_entity.metrics import LOGIT_DIFFERENCE, RELATIVE_PROBABILITY

BASE = random_model(n_layers=3, n_kv_heads=2)
TUNED = fine_tuned(BASE, 0.15)
PROMPTS = random_prompts(5, 9)
ALL: list[Unit] = [
    unit for name, weight in BASE.named_parameters() for unit in units_of(name, weight)
]


def above(layer: int) -> list[Unit]:
    """The units of this layer and what comes after it."""
    late = ("ln_final", "unembed", "b_u")
    return [u for u in ALL if u.kind in late or (u.layer is not None and u.layer >= layer)]


def test_the_corners_of_the_stream_are_those_of_grafted_models() -> None:
    found = four_corners(BASE, TUNED, PROMPTS)
    before = evaluate(BASE, PROMPTS)
    assert found.change.shape == (4, 4, 5)
    for layer in range(4):
        models = [BASE, graft(TUNED, BASE, above(layer)), graft(BASE, TUNED, above(layer)), TUNED]
        for corner, model in enumerate(models):
            expected = evaluate(model, PROMPTS)
            change = expected.answer_log_probability - before.answer_log_probability
            torch.testing.assert_close(found.change[layer, corner], change, atol=1e-10, rtol=0)
            assert torch.equal(found.correct[layer, corner], expected.correct)


@pytest.mark.parametrize("over", ["resid_pre", "attn_out", "mlp_out"])
@pytest.mark.parametrize("position", [None, "place"])
@pytest.mark.parametrize("left", [False, True])
def test_both_engines_agree(over, position, left: bool) -> None:
    prompts = random_prompts(5, 9, left=left)
    exact = four_corners(BASE, TUNED, prompts, over=over, position=position, batch_size=2)
    hooks = four_corners(BASE, TUNED, prompts, over=over, position=position, engine="hooks")
    torch.testing.assert_close(exact.change, hooks.change, atol=1e-10, rtol=1e-10)
    assert torch.equal(exact.correct, hooks.correct)
    assert exact.change.abs().max() > 1e-3


@pytest.mark.parametrize("over", ["resid_pre", "attn_out", "mlp_out"])
def test_at_a_position_one_tokens_value_is_exchanged(over) -> None:
    found = four_corners(
        BASE, TUNED, PROMPTS, over=over, position="place", metric=RELATIVE_PROBABILITY
    )
    rows, place = torch.arange(5), PROMPTS.positions["place"]
    before = evaluate(BASE, PROMPTS).answer_log_probability
    for layer in range(3):
        point = hook_point(over, layer)
        for corner, (model, other) in {1: (BASE, TUNED), 2: (TUNED, BASE)}.items():
            theirs = record(other, PROMPTS, {point: None})[point]

            def patch(x, hook, theirs=theirs):
                x = x.clone()
                x[rows, place] = theirs[rows, place]
                return x

            logits = answer_logits(model, PROMPTS, [(point, patch)])
            value = logits.log_softmax(-1)[rows, PROMPTS.answers]
            torch.testing.assert_close(
                found.change[layer, corner], (value - before).exp() - 1, atol=1e-10, rtol=1e-10
            )


def test_effects_take_the_gain_apart() -> None:
    found = four_corners(BASE, TUNED, PROMPTS)
    below, above_, interaction = found.effects.unbind(1)
    gain = (
        evaluate(TUNED, PROMPTS).answer_log_probability
        - evaluate(BASE, PROMPTS).answer_log_probability
    )
    torch.testing.assert_close(below + above_, gain.expand(4, -1))
    base, tuned_below, tuned_above, tuned = found.change[2]
    torch.testing.assert_close(interaction[2], (tuned - tuned_above) - (tuned_below - base))
    torch.testing.assert_close(below[2], (tuned_below - base + tuned - tuned_above) / 2)
    rows = found.to_dataframe()
    assert rows["below"].tolist() == pytest.approx(below.mean(-1).tolist())
    spread = 1.959963984540054 * float(interaction[1].std()) / 5**0.5
    assert rows["interaction_high"][1] - rows["interaction"][1] == pytest.approx(spread)
    assert rows["base, tuned: accuracy"][3] == found.correct[3, 2].double().mean()


def test_heads_that_only_work_together_interact_between_their_layers() -> None:
    base, tuned, pairs = without_note_and_key(), planted_model(), planted_pairs(24)
    found = four_corners(base, tuned, pairs)
    accuracy = [found.accuracy(1, corner) for corner in range(4)]
    assert max(accuracy[:3]) < 0.5 < 0.9 < accuracy[3]
    gain = float(found.change[0, 3].mean())
    _, _, interaction = found.effects.mean(-1)[1].tolist()
    assert interaction > 0.8 * gain
    # Where both heads are on one side there is nothing to interact.
    for layer in (0, 2):
        assert found.effects[layer, 2].abs().max() < 1e-4 * gain
    assert found.effects[2, 0].mean() == pytest.approx(gain, rel=1e-4)
    assert found.effects[0, 1].mean() == pytest.approx(gain, rel=1e-4)
    # The note is written by the heads of layer 0 at the value asked for, and read by those of 1.
    heads = four_corners(base, tuned, pairs, over="attn_out", position="value")
    assert heads.effects[0, 2].mean() > 0.8 * gain
    mlps = four_corners(base, tuned, pairs, over="mlp_out")
    assert mlps.effects[:, 0].mean(-1).abs().max() < 0.3 * gain


def test_pairs_give_the_foils_that_a_metric_needs() -> None:
    pairs = random_pairs(4)
    pairs = PairBatch(pairs.clean, pairs.corrupt, pairs.targets, (pairs.targets + 1) % 20)
    found = four_corners(BASE, TUNED, pairs, metric=LOGIT_DIFFERENCE)
    values = [
        LOGIT_DIFFERENCE.of_logits(answer_logits(m, pairs.clean), pairs) for m in (BASE, TUNED)
    ]
    torch.testing.assert_close(found.change[1, 3], values[1] - values[0])


def test_it_runs_on_a_bridge_by_hooks() -> None:
    models = {
        backend: [load_model(f"default-{name}", backend=backend, device="cpu") for name in
                  ("base", "tuned")]
        for backend in ("hooked", "bridge")
    }  # fmt: skip
    prompts = random_prompts(3, 9)
    expected = four_corners(*models["hooked"], prompts)
    found = four_corners(*models["bridge"], prompts, engine="hooks")
    torch.testing.assert_close(found.change, expected.change, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="TransformerBridge"):
        four_corners(*models["bridge"], prompts)


def test_what_cannot_be_put_together_is_refused() -> None:
    with pytest.raises(InputError, match="n_layers"):
        four_corners(BASE, random_model(n_layers=2, n_kv_heads=2), PROMPTS)
    with pytest.raises(InputError, match="no position 'nowhere'"):
        four_corners(BASE, TUNED, PROMPTS, position="nowhere")


def test_corners_come_back_and_show_themselves(tmp_path) -> None:
    found = four_corners(BASE, TUNED, PROMPTS, over="mlp_out", position="place")
    found.save(tmp_path / "corners")
    assert same(FourCorners.load(tmp_path / "corners"), found)
    assert "\n" not in repr(found) and 20 < len(str(found)) < 200
    assert found._repr_html_().count("<table") == 1
    lines = {trace.name: trace for trace in found.plot().data if trace.name}
    assert list(lines["interaction"].y) == pytest.approx(found.effects[:, 2].mean(-1).tolist())
    corners = {trace.name: trace for trace in found.plot_corners().data if trace.name}
    assert corners["tuned below, base above"].y[1] == found.accuracy(1, 1)
