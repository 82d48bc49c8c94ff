"""Shares of the gain against autograd through a forward written from scratch, and where the answer
is known."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.independent import Forward
from tests.methods.gains import changed, fine_tuned, without_note_and_key
from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.models.helpers import llama, save
from tests.models.test_adapters import adapt
from tests.random_models import random_model, random_pairs, random_prompts, word_tokenizer
from tests.test_results import same
from tl_entity import (
    Head,
    InputError,
    PairBatch,
    Unit,
    WeightShares,
    box_prompts,
    load_model,
    weight_shares,
)
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.weight_integral import Integration, clenshaw_curtis
from tl_entity.methods.weight_path import WeightPath
from tl_entity.methods.weight_units import (
    ATTENTION_KINDS,
    changed_parameters,
    random_units,
)
from tl_entity.metrics import (
    LOG_PROBABILITY,
    LOGIT_DIFFERENCE,
    RELATIVE_PROBABILITY,
    TARGET_LOGIT,
    Metric,
)
from tl_entity.models.load import with_adapter

SHAPE = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
BASE = random_model(**SHAPE)
TUNED = fine_tuned(BASE)
PAIRS = random_pairs(4)
PAIRS = PairBatch(PAIRS.clean, PAIRS.corrupt, PAIRS.targets, (PAIRS.targets + 3) % 20)

VALUES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "log probability": lambda logits, target, foil: logits.log_softmax(-1)[target],
    "logit difference": lambda logits, target, foil: logits[target] - logits[foil],
}


def rates_by_hand(row: int, at: float, metric: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One prompt, without padding: the metric, and for every parameter its gradient times its
    change, in float64."""
    forward = Forward(BASE)
    theirs = Forward(TUNED).weights
    names = [name for name, _ in BASE.named_parameters()]
    changes = {name: theirs[name] - forward.weights[name] for name in names}
    for name in names:
        forward.weights[name] = (forward.weights[name] + at * changes[name]).requires_grad_(True)
    tokens = PAIRS.clean.tokens[row][PAIRS.clean.mask[row]]
    log_probabilities, _, _ = forward.run(tokens)
    assert PAIRS.foils is not None
    value = VALUES[metric](log_probabilities[-1], int(PAIRS.targets[row]), int(PAIRS.foils[row]))
    gradients = torch.autograd.grad(value, [forward.weights[name] for name in names])
    return value.detach(), {
        name: gradient * changes[name] for name, gradient in zip(names, gradients, strict=True)
    }


def of_units(products: dict[str, Tensor]) -> dict[Unit, float]:
    """Sums over each unit's weights. The names are spelled out here, not taken from the library."""
    kinds = {"W_Q": "q", "_W_K": "k", "_W_V": "v", "W_O": "o", "b_Q": "b_q", "_b_K": "b_k"}
    kinds |= {"_b_V": "b_v", "b_O": "b_o", "W_gate": "gate", "W_in": "in", "W_out": "out"}
    kinds |= {"b_in": "b_in", "b_out": "b_out", "W_E": "embed", "W_U": "unembed", "b_U": "b_u"}
    found: dict[Unit, float] = {}
    for name, product in products.items():
        *path, last = name.split(".")
        layer = int(path[1]) if path[0] == "blocks" else None
        kind = kinds.get(last) or path[-1]
        if kind in ("q", "k", "v", "o", "b_q", "b_k", "b_v"):
            for head, some in enumerate(product):
                found[Unit(kind, layer, head)] = float(some.sum())
        else:
            found[Unit(kind, layer)] = float(product.sum())
    return found


@pytest.mark.parametrize("metric", [LOG_PROBABILITY, LOGIT_DIFFERENCE], ids=lambda m: m.name)
@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_rates_are_those_of_autograd_through_an_independent_forward(
    metric: Metric, at: float
) -> None:
    path = WeightPath(BASE, TUNED, changed_parameters(BASE, TUNED))
    start, _ = path.rates(PAIRS, 0.0, metric, None)
    values, rates = path.rates(PAIRS, at, metric, start)
    assert len(path.units) == len(set(path.units)) == 2 * (4 * 3 + 2 * 4 + 2 * 2 + 6 - 2) + 4
    for row in range(len(PAIRS)):
        value, products = rates_by_hand(row, at, metric.name)
        expected = of_units(products)
        assert set(expected) == set(path.units)
        assert values[row].item() == pytest.approx(value.item(), abs=1e-9)
        for unit, found in zip(path.units, rates[:, row].tolist(), strict=True):
            assert found == pytest.approx(expected[unit], abs=1e-8), unit


def test_shares_are_the_integral_by_another_rule_on_a_fine_grid() -> None:
    path = WeightPath(BASE, TUNED, changed_parameters(BASE, TUNED))
    pairs = PAIRS[:2]
    found = Integration(path, pairs, LOG_PROBABILITY, 2, 65, lambda runs: None)
    shares = found.integral(65)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for row in range(2):
        expected = dict.fromkeys(path.units, 0.0)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            _, products = rates_by_hand(row, (node + 1) / 2, LOG_PROBABILITY.name)
            for unit, rate in of_units(products).items():
                expected[unit] += weight / 2 * rate
        for unit, share in zip(path.units, shares[:, row].tolist(), strict=True):
            assert share == pytest.approx(expected[unit], abs=1e-7), unit
        (before, _), (after, _) = (rates_by_hand(row, at, "log probability") for at in (0.0, 1.0))
        assert found.gain[row].item() == pytest.approx((after - before).item(), abs=1e-9)
        assert shares[:, row].sum().item() == pytest.approx((after - before).item(), abs=1e-7)


def gain_by_running(base, tuned, pairs: PairBatch, metric: Metric) -> Tensor:
    values = [metric.of_logits(answer_logits(model, pairs.clean), pairs) for model in (base, tuned)]
    return metric.change(values[1], values[0])


@pytest.mark.parametrize(
    "metric",
    [LOG_PROBABILITY, LOGIT_DIFFERENCE, TARGET_LOGIT, RELATIVE_PROBABILITY],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_shares_sum_to_the_gain_of_any_metric(metric: Metric, left: bool, n_kv_heads: int) -> None:
    base = random_model(n_layers=2, n_kv_heads=n_kv_heads, dtype=torch.float32)
    tuned = fine_tuned(base, 0.05)
    pairs = random_pairs(5, left=left)
    pairs = PairBatch(pairs.clean, pairs.corrupt, pairs.targets, (pairs.targets + 1) % 20)
    found = weight_shares(base, tuned, pairs, metric=metric)
    gain = gain_by_running(base, tuned, pairs, metric)
    torch.testing.assert_close(found.gain_per_prompt, gain, atol=2e-4, rtol=1e-3)
    assert abs(found.integration_error) < 0.02 and found.prompt_error < 0.05
    assert found.total == pytest.approx(float(gain.mean()), rel=0.02)
    assert found.metric == metric.name
    assert list(found.sum_by_points)[-1] == found.n_points
    assert found.sum_by_points[found.n_points] == pytest.approx(found.total)


@pytest.fixture(scope="module")
def shipped() -> WeightShares:
    base, tuned = (
        load_model("default-base", device="cpu"),
        load_model("default-tuned", device="cpu"),
    )
    return weight_shares(base, tuned, box_prompts(base.tokenizer, 12, n_boxes=7, seed=5))


def test_shares_sum_to_the_gain_on_the_shipped_pair(shipped: WeightShares) -> None:
    base, tuned = (
        load_model("default-base", device="cpu"),
        load_model("default-tuned", device="cpu"),
    )
    prompts = box_prompts(base.tokenizer, 12, n_boxes=7, seed=5)
    rows = torch.arange(len(prompts))
    before, after = (
        model(prompts.tokens)[rows, prompts.positions["last"]].log_softmax(-1)[
            rows, prompts.answers
        ]
        for model in (base, tuned)
    )
    gain = float((after - before).mean())
    assert gain > 2
    assert shipped.gain == pytest.approx(gain, abs=1e-4)
    assert shipped.total == pytest.approx(gain, rel=0.02)
    assert f"{shipped.integration_error:+.2%}" in str(shipped)
    per_prompt = shipped.per_prompt.sum(0) - (after - before)
    assert shipped.prompt_error == pytest.approx(
        float(per_prompt.abs().mean() / (after - before).abs().mean()), abs=1e-3
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_share_depends_on_the_batch(batch_size: int) -> None:
    whole, parts = (weight_shares(BASE, TUNED, PAIRS, batch_size=n) for n in (32, batch_size))
    torch.testing.assert_close(parts.per_prompt, whole.per_prompt, atol=1e-10, rtol=1e-10)
    tight = weight_shares(BASE, TUNED, PAIRS, memory=1)
    torch.testing.assert_close(tight.per_prompt, whole.per_prompt, atol=1e-10, rtol=1e-10)


def test_progress_counts_every_prompt_at_every_point() -> None:
    seen: list[int] = []
    found = weight_shares(BASE, TUNED, PAIRS, batch_size=3, progress=seen.append)
    assert sum(seen) == found.n_points * len(PAIRS) and max(seen) == 3


def test_the_models_stay_as_they_were() -> None:
    base, tuned = copy.deepcopy(BASE), copy.deepcopy(TUNED)
    for model in (base, tuned):
        model.to(torch.bfloat16)
        model.cfg.dtype = torch.bfloat16
    before = [(p, p.clone()) for model in (base, tuned) for p in model.parameters()]
    weight_shares(base, tuned, PAIRS, max_points=5)

    def fail(logits: Tensor, pairs: PairBatch) -> Tensor:
        raise RuntimeError("in the middle of it")

    with pytest.raises(RuntimeError, match="in the middle"):
        weight_shares(base, tuned, PAIRS, metric=Metric("failing", fail))
    after = [p for model in (base, tuned) for p in model.parameters()]
    for (parameter, value), now in zip(before, after, strict=True):
        assert parameter is now and torch.equal(now, value)
    for model in (base, tuned):
        assert model.cfg.dtype == torch.bfloat16
        assert not any(module._forward_hooks for module in model.modules())


def test_bfloat16_weights_are_computed_in_float32() -> None:
    base, tuned = copy.deepcopy(BASE), copy.deepcopy(TUNED)
    wide = []
    for model in (base, tuned):
        model.to(torch.bfloat16)
        model.cfg.dtype = torch.bfloat16
        wide.append(copy.deepcopy(model).float())
        wide[-1].cfg.dtype = torch.float32
    found = weight_shares(base, tuned, PAIRS)
    expected = weight_shares(wide[0], wide[1], PAIRS)
    assert found.per_prompt.dtype == torch.float64 and found.n_points == expected.n_points
    torch.testing.assert_close(found.per_prompt, expected.per_prompt, atol=1e-6, rtol=1e-6)
    assert abs(found.integration_error) < 0.02


def test_weights_that_require_gradients_get_none() -> None:
    base, tuned = copy.deepcopy(BASE), copy.deepcopy(TUNED)
    for model in (base, tuned):
        model.requires_grad_(True)
    found = weight_shares(base, tuned, PAIRS)
    torch.testing.assert_close(found.per_prompt, weight_shares(BASE, TUNED, PAIRS).per_prompt)
    assert all(
        p.grad is None and p.requires_grad for p in [*base.parameters(), *tuned.parameters()]
    )


# Planted changes.


def test_a_change_of_one_heads_q_has_the_whole_gain() -> None:
    base = random_model(n_layers=3, n_kv_heads=2)
    tuned = changed(base, {"blocks.1.attn.W_Q": [2]})
    found = weight_shares(base, tuned, random_prompts(6, 9))
    assert found.units == (Unit("q", 1, 2),)
    gain = gain_by_running(base, tuned, found_pairs(6), LOG_PROBABILITY)
    torch.testing.assert_close(found.per_prompt.sum(0), gain, atol=0.02 * gain.abs().mean(), rtol=0)
    assert found.part([Unit("q", 1, 2)]).of_gain == pytest.approx(1, abs=0.02)
    assert found.share(Unit("q", 1, 1)) == 0


def found_pairs(n: int) -> PairBatch:
    prompts = random_prompts(n, 9)
    return PairBatch(prompts, prompts, prompts.answers)


def test_a_change_of_one_mlp_is_found_in_its_parts() -> None:
    base = random_model(n_layers=3)
    parts = {f"blocks.2.mlp.{name}": None for name in ("W_gate", "W_in", "W_out", "b_in", "b_out")}
    found = weight_shares(base, changed(base, parts), random_prompts(6, 9))
    assert set(found.units) == {Unit(k, 2) for k in ("gate", "in", "out", "b_in", "b_out")}
    assert list(found.mlps()) == [2]
    assert found.mlps()[2].of_gain == pytest.approx(1, abs=0.02)
    assert sum(part.share for part in found.by_kind().values()) == pytest.approx(found.total)


def test_a_key_shared_by_a_group_says_which_heads_read_it() -> None:
    base = random_model(n_layers=2, n_heads=6, n_kv_heads=2)
    found = weight_shares(
        base, changed(base, {"blocks.1.attn._W_K": [1], "blocks.1.attn._b_V": [0]}), PAIRS
    )
    key, bias = Unit("k", 1, 1), Unit("b_v", 1, 0)
    assert set(found.units) == {key, bias}
    assert found.readers(key) == (Head(1, 3), Head(1, 4), Head(1, 5))
    rows = found.to_dataframe().set_index("unit")["read_by"]
    assert rows["L1KV1 k"] == "L1H3 L1H4 L1H5" and rows["L1KV0 b_v"] == "L1H0 L1H1 L1H2"
    assert found.units_of([Head(1, 4), Head(1, 5)]) == (key,)


def test_heads_that_only_work_together_share_what_they_bring() -> None:
    base, tuned, pairs = without_note_and_key(), planted_model(), planted_pairs(24)
    found = weight_shares(base, tuned, pairs)
    note, key = Unit("o", *NOTE), Unit("k", *COPY)
    assert set(found.units) == {note, key} and found.gain > 1
    assert found.total == pytest.approx(found.gain, rel=0.02)
    # By itself neither has any of it, so neither share is what removing or adding it alone says.
    for one in (
        {"blocks.0.attn.W_O": tuned.blocks[0].attn.W_O - base.blocks[0].attn.W_O},
        {"blocks.1.attn.W_K": tuned.blocks[1].attn.W_K - base.blocks[1].attn.W_K},
    ):
        alone = weight_shares(base, changed(base, one), pairs, max_points=5)
        assert abs(alone.gain) < 0.1 * found.gain
    for unit in (note, key):
        assert 0.3 < found.part([unit]).of_gain < 0.7


def test_a_product_of_two_changes_is_shared_in_halves() -> None:
    # One head's v and o, both nothing in the base: its output is their product.
    base = random_model(n_layers=1, n_heads=2, n_kv_heads=2)
    for name in ("W_V", "b_V", "W_O"):
        getattr(base.blocks[0].attn, name).data[1] = 0
    tuned = changed(base, {"blocks.0.attn.W_V": [1], "blocks.0.attn.W_O": [1]})
    found = weight_shares(base, tuned, PAIRS, metric=TARGET_LOGIT)
    torch.testing.assert_close(found.per_prompt[0], found.per_prompt[1], atol=1e-12, rtol=1e-9)
    assert found.part([Unit("v", 0, 1)]).of_gain == pytest.approx(0.5, abs=0.01)


def test_a_change_that_cancels_another_has_its_share_with_the_other_sign() -> None:
    base = random_model(n_layers=2, n_heads=4, n_kv_heads=4)
    attn = base.blocks[1].attn
    for name in ("W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V"):
        getattr(attn, name).data[3] = getattr(attn, name).data[0]  # two heads of one output
    noise = 0.2 * torch.randn(
        8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    change = torch.zeros_like(attn.W_O)
    change[0], change[3] = noise, -noise
    found = weight_shares(base, changed(base, {"blocks.1.attn.W_O": change}), PAIRS)
    one, other = Unit("o", 1, 0), Unit("o", 1, 3)
    assert set(found.units) == {one, other} and found.n_points == 5
    assert abs(found.gain) < 1e-12
    assert abs(found.share(one)) > 1e-3
    assert found.share(one) == pytest.approx(-found.share(other), abs=1e-12)


def test_an_adapter_has_shares_where_it_changes_weights_and_nowhere_else(tmp_path) -> None:
    folder = save(llama(num_key_value_heads=2, head_dim=16), tmp_path / "base")
    adapt(folder, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    base = load_model(folder, device="cpu")
    shared = with_adapter(base, tmp_path / "adapter")
    merged = load_model(folder, adapter=tmp_path / "adapter", device="cpu")
    prompts = random_prompts(4, 9)
    found = weight_shares(base, shared, prompts)
    heads = {Unit("q", layer, head) for layer in range(3) for head in range(4)}
    values = {Unit("v", layer, head) for layer in range(3) for head in range(2)}
    assert set(found.units) == heads | values | {Unit("out", layer) for layer in range(3)}
    assert found.total == pytest.approx(found.gain, rel=0.02)
    torch.testing.assert_close(
        weight_shares(base, merged, prompts).per_prompt, found.per_prompt, atol=1e-5, rtol=1e-4
    )


def test_norms_of_queries_and_keys_have_shares() -> None:
    base = random_model(n_layers=2, n_kv_heads=2, use_qk_norm=True)
    tuned = changed(base, {"blocks.0.attn.q_norm.w": None, "blocks.1.attn.k_norm.w": None})
    found = weight_shares(base, tuned, PAIRS)
    assert set(found.units) == {Unit("q_norm", 0), Unit("k_norm", 1)}
    assert abs(found.integration_error) < 0.02 and found.prompt_error < 0.05


# What is read off the shares.


def test_parts_add_up_and_carry_their_intervals() -> None:
    found = weight_shares(BASE, TUNED, PAIRS)
    for parts in (found.by_kind(), found.by_layer()):
        assert sum(part.share for part in parts.values()) == pytest.approx(found.total)
        assert sum(part.n_units for part in parts.values()) == len(found.units)
    rows = [index for index, unit in enumerate(found.units) if unit.layer == 1]
    per_prompt = found.per_prompt[rows].sum(0).numpy()
    half = 1.959963984540054 * per_prompt.std(ddof=1) / math.sqrt(len(per_prompt))
    part = found.by_layer()[1]
    assert part.share == pytest.approx(per_prompt.mean())
    assert part.interval == pytest.approx((per_prompt.mean() - half, per_prompt.mean() + half))
    # A query head's own: no key or value, which two heads read.
    own = found.by_head()[Head(1, 3)]
    names = [Unit(kind, 1, 3) for kind in ("q", "o", "b_q")]
    assert own.share == pytest.approx(sum(map(found.share, names)))
    sizes = dict(zip(found.units, found.sizes.tolist(), strict=True))
    change = TUNED.blocks[1].attn.W_O[2] - BASE.blocks[1].attn.W_O[2]
    assert sizes[Unit("o", 1, 2)] == pytest.approx(change.norm().item())
    by_size = found.ranked(by_size=True)
    assert [sizes[unit] for unit in by_size] == sorted(sizes.values(), reverse=True)
    shares = [found.share(unit) for unit in found.top(10)]
    assert shares == sorted(found.shares.tolist(), reverse=True)[:10]
    assert list(found.table(3)["unit"]) == [str(unit) for unit in found.top(3)]


def test_the_gain_inside_some_heads_stands_beside_random_units() -> None:
    found = weight_shares(BASE, TUNED, PAIRS)
    inside = found.inside({"last": [Head(0, 0), Head(0, 1)], "place": [Head(1, 2)]}, draws=400)
    assert inside.heads == (Head(0, 0), Head(0, 1), Head(1, 2))
    kv = ("k", "v", "b_k", "b_v")
    qo = ("q", "o", "b_q")
    # Both heads of the group are inside: its keys and values are too. Of the other only one is.
    chosen = [Unit(kind, 0, head) for kind in qo for head in (0, 1)]
    chosen += [Unit(kind, 0, 0) for kind in kv] + [Unit(kind, 1, 2) for kind in qo]
    assert inside.parts["inside"] == found.part(chosen)
    assert inside.parts["shared"] == found.part([Unit(kind, 1, 1) for kind in kv])
    assert inside.parts["MLPs"] == found.part([unit for unit in found.units if unit.kind in
                                               ("gate", "in", "out", "b_in", "b_out")])  # fmt: skip
    assert sum(part.share for part in inside.parts.values()) == pytest.approx(found.total)
    # The mean of random sets is known: each kind and layer gives its mean as often as it is inside.
    expected = 0.0
    for unit in chosen:
        alike = [u for u in found.units if (u.kind, u.layer) == (unit.kind, unit.layer)]
        expected += sum(map(found.share, alike)) / len(alike)
    spread = inside.random.std() / math.sqrt(400)
    assert inside.random.mean() == pytest.approx(expected, abs=4 * spread)
    with pytest.raises(InputError, match="no head L2H0"):
        found.inside([Head(2, 0)])


def test_random_units_have_the_layers_and_kinds_of_those_given() -> None:
    units = [Unit(kind, layer, head) for kind in "qo" for layer in range(3) for head in range(5)]
    like = [Unit("q", 0, 0), Unit("q", 0, 1), Unit("o", 2, 4)]
    drawn = random_units(units, like, draws=50, seed=1)
    for some in drawn:
        assert len(set(some)) == 3
        assert sorted((unit.kind, unit.layer) for unit in some) == [("o", 2), ("q", 0), ("q", 0)]
    assert len(set(drawn)) > 20
    assert random_units(units, like, draws=50, seed=1) == drawn


def test_the_rule_integrates_polynomials_exactly() -> None:
    for n in (3, 5, 9):
        points = (1 - np.cos(np.pi * np.arange(n) / (n - 1))) / 2
        for degree in range(n):
            assert clenshaw_curtis(n) @ points**degree == pytest.approx(1 / (degree + 1))


def test_shares_come_back_from_their_file_and_show_themselves(tmp_path) -> None:
    found = weight_shares(BASE, TUNED, random_prompts(4, 9))
    for result in (found, found.inside([Head(0, 1)], draws=10)):
        result.save(tmp_path / "result")
        assert same(type(result).load(tmp_path / "result"), result)
        assert "\n" not in repr(result) and "tensor" not in repr(result)
        assert 20 < len(str(result)) < 240
        assert result._repr_html_().count("<table") == 1
        assert result.plot().layout.title.text


def test_figures_show_the_shares() -> None:
    found = weight_shares(BASE, TUNED, PAIRS)
    maps = {trace.name: trace for trace in found.plot().data}
    assert maps["q"].z[1][3] == pytest.approx(found.share(Unit("q", 1, 3)))
    assert maps["k (KV)"].z.shape == (2, 2)
    assert list(maps["MLP"].x) == ["gate", "in", "out", "b_in", "b_out"]
    (bars,) = found.plot_bars().data
    *parts, gain = zip(bars.x, bars.base, bars.y, strict=True)
    assert gain == ("gain", 0, pytest.approx(found.gain))
    height = 0.0
    for (kind, base, value), (expected, part) in zip(parts, found.by_kind().items(), strict=True):
        assert (kind, base, value) == (expected, pytest.approx(height), pytest.approx(part.share))
        height += value
    assert height == pytest.approx(found.gain, rel=0.02)


# Refusals.


def test_pairs_that_are_no_pair_are_refused() -> None:
    prompts = random_prompts(3, 9)
    with pytest.raises(InputError, match="same weights"):
        weight_shares(BASE, copy.deepcopy(BASE), prompts)
    with pytest.raises(InputError, match="n_layers"):
        weight_shares(BASE, random_model(n_layers=3, n_kv_heads=2), prompts)
    with pytest.raises(InputError, match="d_vocab"):
        weight_shares(BASE, random_model(**SHAPE, d_vocab=21), prompts)
    with pytest.raises(InputError, match=r"attn\.b_Q"):
        other = copy.deepcopy(TUNED)
        other.blocks[0].attn.b_Q = torch.nn.Parameter(torch.zeros(1, 8, dtype=torch.float64))
        weight_shares(BASE, other, prompts)


def test_tokenizers_that_differ_are_refused() -> None:
    base, tuned = copy.deepcopy(BASE), copy.deepcopy(TUNED)
    base.tokenizer, tuned.tokenizer = word_tokenizer(["a", "b"]), word_tokenizer(["b", "a"])
    with pytest.raises(InputError, match="tokenizers"):
        weight_shares(base, tuned, random_prompts(3, 9))


def test_one_shape_more_in_a_weight_is_refused_by_its_name() -> None:
    base, tuned = copy.deepcopy(BASE), copy.deepcopy(TUNED)
    base.tokenizer = tuned.tokenizer = word_tokenizer(["a", "b"])
    tuned.embed.W_E = torch.nn.Parameter(torch.zeros(21, 24, dtype=torch.float64))
    with pytest.raises(InputError, match=r"embed\.W_E \(\(20, 24\) and \(21, 24\)\)"):
        weight_shares(base, tuned, random_prompts(3, 9))


def test_what_has_no_share_is_refused() -> None:
    prompts = random_prompts(3, 9)
    plain = random_model(n_layers=1, gated_mlp=False)
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.W_in"):
        weight_shares(plain, changed(plain, {"blocks.0.mlp.W_in": None}), prompts)
    layer_norm = random_model(n_layers=1, normalization_type="LN")
    with pytest.raises(InputError, match=r"blocks\.0\.ln1\.b"):
        weight_shares(layer_norm, changed(layer_norm, {"blocks.0.ln1.b": None}), prompts)
    split = copy.deepcopy(BASE)
    split.cfg.use_split_qkv_input = True
    with pytest.raises(InputError, match="set apart"):
        weight_shares(split, TUNED, prompts)
    broken = copy.deepcopy(TUNED)
    broken.blocks[1].mlp.W_in.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.W_in.*not finite"):
        weight_shares(BASE, broken, prompts)
    bridge = load_model("default-base", backend="bridge", device="cpu")
    with pytest.raises(InputError, match="TransformerBridge"):
        weight_shares(bridge, bridge, prompts)


def test_prompts_that_cannot_be_scored_are_refused() -> None:
    prompts = random_prompts(3, 9)
    prompts.answers[1] = -1
    with pytest.raises(InputError, match="no answer"):
        weight_shares(BASE, TUNED, prompts)
    prompts.answers[1] = 20
    with pytest.raises(InputError, match="token 20"):
        weight_shares(BASE, TUNED, prompts)
    with pytest.raises(InputError, match="foils"):
        weight_shares(BASE, TUNED, random_pairs(3), metric=LOGIT_DIFFERENCE)
    with pytest.raises(InputError, match="at least 5 points"):
        weight_shares(BASE, TUNED, PAIRS, max_points=4)
    infinite = Metric("infinite", lambda logits, pairs: logits[..., 0] * math.inf)
    with pytest.raises(InputError, match=r"infinite.*not finite"):
        weight_shares(BASE, TUNED, PAIRS, metric=infinite)


def test_it_stops_with_what_was_reached() -> None:
    # Models that have nothing to do with each other: the way between them is far from smooth.
    other = random_model(**SHAPE, seed=1)
    found = weight_shares(BASE, other, PAIRS, max_points=10)
    assert found.n_points == 9 and list(found.sum_by_points) == [5, 9]
    finer = weight_shares(BASE, other, PAIRS)
    assert finer.n_points > 9
    assert finer.prompt_error < found.prompt_error
    assert set(ATTENTION_KINDS) <= {unit.kind for unit in finer.units}
