"""DCM against its definition: by hand, by finite differences, and on models with known circuits."""

import math

import pytest
import torch

from tests.independent import Forward
from tests.methods.planted import COPY, planted_model, planted_pairs
from tests.random_models import random_model, random_pairs
from tl_entity import Circuit, Head, InputError, PairBatch, load_model
from tl_entity.methods.activation_patching import activation_patch
from tl_entity.methods.dcm import MaskStep, learn_mask, learn_masks
from tl_entity.methods.masked_forward import MaskedForward
from tl_entity.models.registry import planted_circuit
from tl_entity.tasks.desiderata import desideratum_pairs

ENGINES = pytest.mark.parametrize("engine", ["exact", "hooks"])
HEADS = [Head(2, 1), Head(0, 3), Head(1, 0), Head(2, 2), Head(1, 3)]
"""Of several layers, out of order, two of a layer, two that share a key-value head."""


def counted_runs(model: object) -> list[int]:
    """Prompts of every full run of the model, as they happen."""
    runs: list[int] = []
    model.embed.register_forward_hook(lambda module, given, out: runs.append(len(out)))
    return runs


@pytest.mark.parametrize(("n_kv_heads", "left"), [(4, False), (2, True), (2, False)])
@pytest.mark.parametrize("position", ["last", "place", "early"])
def test_engines_agree(position: str, n_kv_heads: int, left: bool) -> None:
    model = random_model(n_kv_heads=n_kv_heads)
    pairs = random_pairs(12, left=left)
    exact, hooks = (
        learn_mask(
            model,
            pairs[:7],
            HEADS,
            position=position,
            batch_size=3,
            epochs=3,
            validation=pairs[7:],
            engine=engine,
        )
        for engine in ("exact", "hooks")
    )
    assert exact.losses.shape == (9,)
    torch.testing.assert_close(exact.losses, hooks.losses, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(exact.trajectory, hooks.trajectory, atol=1e-6, rtol=0)
    assert exact.best_step == hooks.best_step
    assert torch.equal(exact.validation_correct, hooks.validation_correct)
    assert (exact.losses[1:] != exact.losses[0]).all()


@ENGINES
def test_mixture_is_what_an_independent_forward_computes(engine: str) -> None:
    model = random_model(n_kv_heads=2)
    pairs = random_pairs(5)
    mask = torch.tensor([0.2, 0.9, 0.0, 1.0, 0.6], dtype=torch.float64)
    masked = MaskedForward(model, HEADS, position="place", engine=engine)
    found = masked.run(pairs, mask).log_softmax(-1)
    forward = Forward(model)
    for row in range(len(pairs)):
        base, other = (batch.tokens[row][batch.mask[row]] for batch in (pairs.clean, pairs.corrupt))
        at, read_at = (int(batch.positions["place"][row]) for batch in (pairs.clean, pairs.corrupt))
        _, other_z, _ = forward.run(other)

        def mix(layer: int, head: int, z: torch.Tensor) -> torch.Tensor:
            if (layer, head) in HEADS:
                m = mask[HEADS.index((layer, head))]
                z[at] = m * z[at] + (1 - m) * other_z[layer, head][read_at]  # noqa: B023
            return z

        expected, _, _ = forward.run(base, edit_z=mix)
        torch.testing.assert_close(found[row], expected[-1], atol=1e-9, rtol=1e-9)


@ENGINES
def test_gradient_is_the_slope_of_the_loss(engine: str) -> None:
    model, pairs = random_model(n_kv_heads=2), random_pairs(5)
    masked = MaskedForward(model, HEADS, position="place", engine=engine)
    recorded = masked.record(pairs)
    start = torch.tensor([0.2, 0.9, 0.4, 0.7, 0.6], dtype=torch.float64)

    def target_logit(mask: torch.Tensor) -> torch.Tensor:
        return masked.run(recorded, mask, tokens=pairs.targets[:, None]).mean()

    masked.mask.data[:] = start
    target_logit(masked.mask).backward()
    step = 1e-5
    for i in range(len(HEADS)):
        nudge = torch.zeros_like(start)
        nudge[i] = step
        slope = (target_logit(start + nudge) - target_logit(start - nudge)) / (2 * step)
        assert masked.mask.grad[i] == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)
        assert abs(slope) > 1e-6


@ENGINES
def test_training_is_adam_with_clamping_step_by_step(engine: str) -> None:
    model, pairs = random_model(), random_pairs(6, seed=3)
    heads, rate, price = HEADS[:3], 0.3, 0.05
    masked = MaskedForward(model, heads, position="last", engine="hooks")

    def loss_of(batch: PairBatch, mask: torch.Tensor) -> float:
        logits = masked.run(batch, mask)
        right = logits[torch.arange(len(batch)), batch.targets]
        return (-right.mean() + price * (1 - mask).sum()).item()

    mask = torch.ones(3, dtype=torch.float64)
    first, second = torch.zeros_like(mask), torch.zeros_like(mask)
    losses, masks = [], []
    for count, rows in enumerate([slice(0, 4), slice(4, 6)] * 3, start=1):
        mask = mask.clamp(0, 1)
        losses.append(loss_of(pairs[rows], mask))
        gradient = torch.zeros_like(mask)
        for i in range(3):
            nudge = torch.zeros_like(mask)
            nudge[i] = 1e-5
            higher, lower = loss_of(pairs[rows], mask + nudge), loss_of(pairs[rows], mask - nudge)
            gradient[i] = (higher - lower) / 2e-5
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        moved = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        mask = mask - rate * moved
        masks.append(mask.clamp(0, 1))
    found = learn_mask(
        model,
        pairs,
        heads,
        position="last",
        sparsity=price,
        lr=rate,
        epochs=3,
        batch_size=4,
        engine=engine,
    )
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(found.trajectory, torch.stack(masks), atol=1e-5, rtol=0)
    assert torch.equal(found.values, found.trajectory[-1])
    # The first step has the learning rate's length, whatever the gradient's.
    went_down = found.trajectory[0] < 1
    assert went_down.any()
    assert found.trajectory[0][went_down].tolist() == pytest.approx(
        [1 - rate] * int(went_down.sum())
    )
    assert (found.trajectory == 1).any()  # clamped on the way


@ENGINES
def test_a_counterfactual_that_is_the_base_leaves_nothing_but_the_price(engine: str) -> None:
    clean = random_pairs(4).clean
    found = learn_mask(
        random_model(),
        PairBatch(clean, clean, clean.answers),
        HEADS,
        position="place",
        epochs=5,
        engine=engine,
    )
    assert torch.equal(found.losses, found.losses[:1].expand(5))
    assert torch.equal(found.trajectory, torch.ones(5, len(HEADS), dtype=torch.float64))
    assert found.selected == ()


def test_masks_stay_between_0_and_1() -> None:
    found = learn_mask(
        random_model(), random_pairs(6), HEADS, position="last", lr=5.0, batch_size=2, sparsity=0.0
    )
    assert (found.trajectory.min(), found.trajectory.max()) == (0, 1)


def copying_pairs(n_pairs: int, seed: int) -> PairBatch:
    """For the model whose circuit is written into its weights: other values in the counterfactual,
    whose answer is the target."""
    base, other = planted_pairs(n_pairs, seed).clean, planted_pairs(n_pairs, seed + 1).clean
    differ = base.answers != other.answers
    return PairBatch(base[differ], other[differ], other.answers[differ])


@ENGINES
def test_the_head_that_carries_the_value_is_selected_and_no_idle_one(engine: str) -> None:
    model = planted_model()
    every = [Head(layer, head) for layer in range(2) for head in range(4)]
    found = learn_mask(
        model,
        copying_pairs(160, 0),
        every,
        position="last",
        sparsity=1.0,
        validation=copying_pairs(40, 10),
        engine=engine,
    )
    assert found.selected == (COPY,)
    assert found.validation_accuracy == 1.0
    assert str(found) == "1 of 8 heads at last: L1H2; validation accuracy 1.000"
    low, high = found.validation_interval
    assert 0.85 < low < high == 1.0


@pytest.mark.parametrize(("position", "group"), [("last", 1), ("query_label", 2)])
def test_position_is_found_where_it_was_planted(position: str, group: int) -> None:
    model = load_model("default-tuned")
    planted = list(Circuit.load(planted_circuit("default-tuned")))[group]
    assert planted.position == position
    pairs = desideratum_pairs(model.tokenizer, "position", 160, seed=1)
    every = [Head(layer, head) for layer in range(4) for head in range(8)]
    found = learn_mask(
        model, pairs[:120], every, position=position, epochs=3, validation=pairs[120:]
    )
    assert found.selected == planted.heads
    assert found.validation_accuracy > 0.9


def test_validation_keeps_most_heads_of_equals_and_the_earliest_of_these() -> None:
    model, pairs = random_model(), random_pairs(6)
    # Taken from the base itself, any heads answer these equally often.
    base = random_pairs(5, seed=1).clean
    equal = PairBatch(base, base, base.answers)
    how = {"position": "last", "batch_size": 2, "epochs": 5, "sparsity": 0.0}
    found = learn_mask(model, pairs, HEADS, validation=equal, **how)
    n_selected = (found.trajectory < 0.5).sum(1)
    assert n_selected[0] < n_selected.max()
    assert found.validation_correct.unique().numel() == 1
    assert found.best_step == int(n_selected.argmax())
    assert torch.equal(found.values, found.trajectory[found.best_step])
    assert len(found.selected) == n_selected.max()
    without = learn_mask(model, pairs, HEADS, **how)
    assert torch.equal(without.trajectory, found.trajectory)
    assert without.best_step == len(without.losses) - 1
    assert without.validation_accuracy is without.validation_interval is None


def test_validation_keeps_the_best_mask_not_the_last() -> None:
    model = planted_model()
    unmoved = planted_pairs(30, 20)
    right_by_itself = PairBatch(unmoved.clean, unmoved.corrupt, unmoved.clean.answers)
    how = {"position": "last", "sparsity": 1.0}
    pairs = copying_pairs(160, 0)
    found = learn_mask(model, pairs, [COPY], validation=right_by_itself, **how)
    assert learn_mask(model, pairs, [COPY], **how).selected == (COPY,)
    assert found.selected == ()
    assert found.best_step == 0
    assert found.validation_accuracy == 1.0
    assert found.validation_correct[-1] < 30


def test_half_is_not_below_half() -> None:
    masked = MaskedForward(random_model(), HEADS[:3], position="last")
    masked.mask.data[:] = torch.tensor([0.5, 0.4999, 0.0])
    assert masked.selected == (HEADS[1], HEADS[2])


def test_runs_are_recorded_once_unless_memory_is_short() -> None:
    model = random_model()
    pairs, validation = random_pairs(7), random_pairs(3, seed=1)
    how = {"position": "last", "batch_size": 3, "epochs": 4, "validation": validation}
    runs = counted_runs(model)
    kept = learn_mask(model, pairs, HEADS, **how)
    assert sum(runs) == 2 * (7 + 3)
    runs.clear()
    anew = learn_mask(model, pairs, HEADS, memory=0, **how)
    n_rounded = len({tuple(mask) for mask in (kept.trajectory < 0.5).tolist()})
    assert sum(runs) == 2 * (4 * 7 + n_rounded * 3)
    assert torch.equal(kept.losses, anew.losses)
    assert torch.equal(kept.trajectory, anew.trajectory)


@ENGINES
def test_masked_forward_trains_in_ones_own_loop(engine: str) -> None:
    model = random_model().requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pairs = random_pairs(6)
    masked = MaskedForward(model, HEADS, position="last", engine=engine)
    assert [name for name, _ in masked.named_parameters()] == ["mask"]
    assert list(masked.state_dict()) == ["mask"]
    assert torch.equal(masked.mask.detach(), torch.ones(5, dtype=torch.float64))
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        for batch in pairs.chunks(2):
            masked.clamp_()
            optimizer.zero_grad()
            logits = masked(batch)
            assert logits.shape == (2, model.cfg.d_vocab)
            right = logits[torch.arange(2), batch.targets]
            loss = -right.mean() + 0.01 * (1 - masked.mask).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    found = learn_mask(model, pairs, HEADS, position="last", batch_size=2, engine=engine)
    assert losses == pytest.approx(found.losses.tolist(), rel=1e-9)
    masked.clamp_()
    torch.testing.assert_close(masked.mask.detach(), found.values)
    assert masked.selected == found.selected
    for name, weight in model.named_parameters():
        assert weight.requires_grad
        assert weight.grad is None
        assert torch.equal(weight, before[name])


def test_mask_of_a_half_precision_model_is_single_precision() -> None:
    model = random_model(dtype=torch.float32).to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    found = learn_mask(model, random_pairs(4), HEADS, position="last", engine="hooks")
    assert found.values.dtype == torch.float32
    assert found.losses.isfinite().all()


def test_learning_masks_for_several_prices_and_draws() -> None:
    model = random_model()
    how = {"position": "place", "batch_size": 4, "epochs": 3, "lr": 0.3}
    steps: list[MaskStep] = []
    runs = counted_runs(model)
    found = learn_masks(
        model,
        lambda seed: random_pairs(15, seed=seed),
        HEADS,
        seeds=(5, 6),
        sparsities=(0.0, 100.0),
        progress=steps.append,
        **how,
    )
    assert sum(runs) == 2 * (2 * 15)  # shared between prices
    assert [step.step for step in steps] == list(range(1, 2 * 2 * 6 + 1))
    assert {step.n_steps for step in steps} == {2 * 2 * 6}
    assert [step.sparsity for step in steps[::6]] == [0.0, 100.0] * 2
    assert [(run.seed, run.mask.sparsity) for run in found.runs] == [
        (seed, price) for seed in (5, 6) for price in (0.0, 100.0)
    ]
    for i, run in enumerate(found.runs):
        pairs = random_pairs(15, seed=run.seed)
        alone = learn_mask(
            model, pairs[:7], HEADS, sparsity=run.mask.sparsity, validation=pairs[7:10], **how
        )
        assert torch.equal(run.mask.losses, alone.losses)
        assert torch.equal(run.mask.values, alone.values)
        assert len(run.test) == 5
        for test, heads in (
            (run.test, run.mask.selected),
            (run.test_of_all, HEADS),
            (run.test_of_none, ()),
        ):
            patched = activation_patch(model, pairs[10:], {"place": heads})
            assert torch.equal(test.predicted, patched.predicted)
        last_steps = steps[i * 6 : (i + 1) * 6]
        assert [step.loss for step in last_steps] == run.mask.losses.tolist()
        assert [step.n_selected for step in last_steps] == (
            (run.mask.trajectory < 0.5).sum(1).tolist()
        )
    # No head is worth a hundred.
    assert all(run.mask.selected == () for run in found.runs if run.mask.sparsity == 100)
    assert any(run.mask.selected for run in found.runs)
    assert set(found.selection_share(100.0).values()) == {0.0}
    frame = found.to_dataframe()
    assert frame["n_selected"].tolist() == [len(run.mask.selected) for run in found.runs]
    assert frame["test_accuracy"].tolist() == [run.test.accuracy for run in found.runs]


def test_pairs_are_shuffled_by_the_seed_when_they_are_given() -> None:
    model, pairs = random_model(), random_pairs(12)
    how = {"position": "last", "seeds": (0, 1)}
    found, again = (learn_masks(model, pairs, HEADS, **how) for _ in range(2))
    first, second = found.runs
    assert not torch.equal(first.mask.losses, second.mask.losses)
    assert torch.equal(again.runs[1].mask.losses, second.mask.losses)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        learn_mask(model, pairs[order[:6]], HEADS, position="last").losses, second.mask.losses
    )


def test_results_as_tables() -> None:
    pairs = random_pairs(8)
    found = learn_mask(random_model(), pairs[:6], HEADS, position="last", validation=pairs[6:])
    frame, history = found.to_dataframe(), found.history()
    assert frame["head"].tolist() == [str(head) for head in HEADS]
    assert frame["selected"].tolist() == [head in found.selected for head in HEADS]
    assert history["loss"].tolist() == found.losses.tolist()
    assert history["validation_accuracy"][found.best_step] == found.validation_accuracy
    bare = learn_mask(random_model(), pairs, HEADS, position="last").history()
    assert all(math.isnan(accuracy) for accuracy in bare["validation_accuracy"])


def test_bad_questions_are_refused() -> None:
    model, pairs = random_model(), random_pairs(4)
    how = {"position": "last"}
    for candidates, message in (
        ([], "no candidate heads"),
        ([Head(0, 1), Head(0, 1)], "candidate twice"),
        ([Head(0, 9)], "no head L0H9"),
    ):
        with pytest.raises(InputError, match=message):
            learn_mask(model, pairs, candidates, **how)
    with pytest.raises(InputError, match="no position 'nowhere'"):
        learn_mask(model, pairs, HEADS, position="nowhere")
    with pytest.raises(InputError, match="0 epochs"):
        learn_mask(model, pairs, HEADS, epochs=0, **how)
    with pytest.raises(InputError, match="4 pairs in batches of 0"):
        learn_mask(model, pairs, HEADS, batch_size=0, **how)
    with pytest.raises(InputError, match="0 pairs in batches"):
        learn_mask(model, pairs[:0], HEADS, **how)
    with pytest.raises(InputError, match="no target"):
        learn_mask(model, PairBatch(pairs.clean, pairs.corrupt, pairs.targets - 20), HEADS, **how)
    with pytest.raises(InputError, match="at least one seed and one sparsity"):
        learn_masks(model, pairs, HEADS, seeds=(), **how)
    with pytest.raises(InputError, match="3 pairs can't be split"):
        learn_masks(model, pairs[:3], HEADS, seeds=(0,), **how)
    found = learn_masks(model, pairs, HEADS, seeds=(0,), **how)
    with pytest.raises(InputError, match="No mask was trained at sparsity 3"):
        found.selection_share(3.0)
    unfit = random_model(attn_scores_soft_cap=30.0, n_kv_heads=2)
    with pytest.raises(InputError, match='engine="hooks"'):
        learn_mask(unfit, pairs, HEADS, **how)
