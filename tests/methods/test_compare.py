"""Comparisons of circuits, counted by hand and drawn by drawn."""

import math

import numpy as np
import pytest
import torch

from tests.methods.planted import COPY, NOTE, STAGES, planted_model, planted_pairs
from tl_entity import (
    Circuit,
    Discovery,
    Faithfulness,
    Group,
    Head,
    HeadScores,
    InputError,
    evaluate,
)
from tl_entity.methods.compare import WHOLE_CIRCUIT, compare
from tl_entity.methods.discovery import (
    ENTITY_TRACKING_STAGES,
    Stage,
    choose_heads,
    discover_circuit,
)
from tl_entity.stats import Bootstrap, overlap_by_chance

N_LAYERS, N_HEADS = 4, 3
SIZES = {"value_fetcher": 3, "pos_transmitter": 2, "pos_detector": 2, "struct_reader": 1}
TOPS = {"value_fetcher": 4, "pos_transmitter": 3, "pos_detector": 2, "struct_reader": 1}


def discovery(
    seed: int,
    *,
    n_pairs: int = 12,
    noise: float = 1.0,
    tops: dict[str, int] = TOPS,
    sizes: dict[str, int] = SIZES,
    stages: tuple[Stage, ...] = ENTITY_TRACKING_STAGES,
) -> Discovery:
    """Scores that all seeds have in common, and noise that is a seed's own."""
    common = torch.Generator().manual_seed(100)
    own = torch.Generator().manual_seed(seed)
    shape = (N_LAYERS, N_HEADS, n_pairs)
    scores = {}
    for stage in stages:
        per_example = torch.randn((N_LAYERS, N_HEADS, 1), generator=common) + noise * torch.randn(
            shape, generator=own
        )
        top = tops[stage.group]
        per_example[top:] = 0
        receivers = None if top == N_LAYERS else (Head(top, 0),)
        scores[stage.group] = HeadScores(
            per_example=per_example,
            clean_values=torch.zeros(n_pairs),
            position=stage.position,
            receivers=receivers,
            receiver_input=None if receivers is None else "q",
            engine="exact",
        )
    return Discovery(choose_heads(scores, sizes, stages), scores, {})


def test_heads_are_counted() -> None:
    found = compare(BASE, TUNED, seed=0)
    for group in BASE.circuit:
        ours, theirs = set(group.heads), set(TUNED.circuit[group.name])
        overlap = found[group.name]
        assert {head for _, head in overlap.shared} == ours & theirs
        assert {head for _, head in overlap.new} == theirs - ours
        assert {head for _, head in overlap.lost} == ours - theirs
        assert {place for place, _ in (*overlap.shared, *overlap.new)} == {group.position}
        assert overlap.precision == len(ours & theirs) / len(theirs)
        assert overlap.recall == len(ours & theirs) / len(ours)
        assert overlap.jaccard == len(ours & theirs) / len(ours | theirs)
    # A head that changes from one group to another at the same position is still the same head.
    ours, theirs = (
        {(at, head) for at, heads in one.circuit.heads_at().items() for head in heads}
        for one in (BASE, TUNED)
    )
    assert set(found.whole.shared) == ours & theirs
    assert set(found.whole.new) == theirs - ours
    assert found.whole.jaccard == len(ours & theirs) / len(ours | theirs)
    assert found[WHOLE_CIRCUIT] is found.whole
    with pytest.raises(KeyError):
        found["nothing"]


BASE, TUNED = discovery(0), discovery(1)


def test_the_known_sets_give_the_known_numbers() -> None:
    """Four heads in the base and three in the tuned model, two in both: precision 2/3, recall 2/4,
    Jaccard 2/5. Of twelve heads; by chance 4 · 3 / 12 = 1 is shared."""
    stage = (Stage("only", "last"),)
    flat = torch.ones(2, 12, 5)
    flat[0, [0, 1, 2, 3]] = -1
    flat[1, [2, 3, 4]] = -1
    both = []
    for row, size in ((0, 4), (1, 3)):
        scores = {
            "only": HeadScores(
                flat[row].view(N_LAYERS, N_HEADS, 5), torch.zeros(5), "last", None, None, "exact"
            )
        }
        both.append(Discovery(choose_heads(scores, {"only": size}, stage), scores, {}))
    found = compare(*both, seed=0)
    (only,) = found.groups
    assert only.shared == (("last", Head(0, 2)), ("last", Head(1, 0)))
    assert only.new == (("last", Head(1, 1)),)
    assert only.lost == (("last", Head(0, 0)), ("last", Head(0, 1)))
    assert (only.precision, only.recall, only.jaccard) == (2 / 3, 1 / 2, 2 / 5)
    # The pairs agree with each other: whichever are drawn, the heads are the same.
    assert only.precision_interval == (2 / 3, 2 / 3)
    assert only.recall_interval == (1 / 2, 1 / 2)
    assert only.jaccard_interval == (2 / 5, 2 / 5)
    assert only.population == 12
    assert only.chance.expected == pytest.approx(1)
    # C(12, 3) = 220 choices: 4 share three, 6 · 8 = 48 share two, 4 · 28 = 112 one, 56 none.
    assert only.p_value == pytest.approx(52 / 220)
    assert only.chance_jaccard == pytest.approx((112 / 6 + 48 * 2 / 5 + 4 * 3 / 4) / 220)
    # With 97.5 % at most two are shared, none with more than 2.5 %.
    assert only.chance_interval == (0, 2 / 5)
    figure = found.plot()
    assert [trace.name for trace in figure.data] == ["both circuits", "drawn at random"]
    assert figure.data[0].y[0] == 2 / 5
    assert figure.data[1].y[0] + figure.data[1].error_y.array[0] == 2 / 5
    # Ranks: four heads 2.5 and eight 8.5, three heads 2 and nine 8; two of them shared.
    one = np.array([2.5] * 4 + [8.5] * 8)
    other = np.array([8, 8, 2, 2, 2, *[8] * 7])
    assert only.correlation == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert found.whole.shared == only.shared
    assert found.whole.chance == only.chance
    assert math.isnan(found.whole.correlation)
    assert "2 heads shared (1.0 by chance), 1 new, 2 lost" in str(only)
    assert "nan" not in str(found)


def test_only_heads_that_reach_in_both_can_be_shared() -> None:
    low = discovery(1, tops={**TOPS, "pos_transmitter": 2})
    found = compare(BASE, low, seed=0)
    overlap = found["pos_transmitter"]
    assert overlap.population == 6
    counts = [sum(head.layer < 2 for head in one.circuit.pos_transmitter) for one in (BASE, low)]
    assert overlap.chance == overlap_by_chance(6, *counts)
    # At the last token, all groups can choose in layers 0 and 1, then not all, then only one.
    chance = overlap_by_chance(0, 0, 0)
    for first, last in ((0, 2), (2, 3), (3, 4)):
        counts = [
            sum(first <= head.layer < last for head in one.circuit.heads_at()["last"])
            for one in (BASE, low)
        ]
        chance = chance.and_also(overlap_by_chance(3 * (last - first), *counts))
    for name in ("pos_detector", "struct_reader"):
        chance = chance.and_also(found[name].chance)
    assert found.whole.chance.probabilities == pytest.approx(chance.probabilities)
    assert found.whole.population == 12 + 6 + 3


@pytest.mark.parametrize(("n_pairs", "paired"), [(12, True), (12, False), (9, False)])
def test_intervals_are_of_circuits_chosen_anew(n_pairs: int, paired: bool) -> None:
    tuned = discovery(1, n_pairs=n_pairs)
    found = compare(BASE, tuned, seed=5, draws=80, sizes=SIZES, paired=paired)
    assert found.paired is paired
    draws = [Bootstrap.draw(12, seed=5, draws=80)]
    draws.append(draws[0] if paired else Bootstrap.draw(n_pairs, seed=6, draws=80))
    jaccards: dict[str, list[float]] = {name: [] for name in (*SIZES, WHOLE_CIRCUIT)}
    recalls = []
    for draw in range(80):
        circuits = []
        for one, bootstrap in zip((BASE, tuned), draws, strict=True):
            rows = np.repeat(
                np.arange(bootstrap.counts.shape[1]), bootstrap.counts[draw].astype(int)
            )
            resampled = {
                name: HeadScores(
                    scores.per_example[..., torch.from_numpy(rows)],
                    scores.clean_values,
                    scores.position,
                    scores.receivers,
                    scores.receiver_input,
                    "exact",
                )
                for name, scores in one.scores.items()
            }
            circuits.append(choose_heads(resampled, SIZES, ENTITY_TRACKING_STAGES))
        places = [
            {
                **{group.name: set(group.heads) for group in circuit},
                WHOLE_CIRCUIT: {
                    (at, head) for at, heads in circuit.heads_at().items() for head in heads
                },
            }
            for circuit in circuits
        ]
        for name in jaccards:
            ours, theirs = (some[name] for some in places)
            jaccards[name].append(
                len(ours & theirs) / len(ours | theirs) if ours | theirs else math.nan
            )
        ours, theirs = (some["pos_detector"] for some in places)
        recalls.append(len(ours & theirs) / len(ours))
    for name, values in jaccards.items():
        expected = np.nanquantile(values, [0.025, 0.975])
        assert found[name].jaccard_interval == pytest.approx(tuple(expected)), name
    expected = np.quantile(recalls, [0.025, 0.975])
    assert found["pos_detector"].recall_interval == pytest.approx(tuple(expected))


def test_a_discovery_is_the_same_as_itself() -> None:
    found = compare(BASE, BASE, seed=0, paired=True)
    for overlap in (*found.groups, found.whole):
        assert (overlap.precision, overlap.recall, overlap.jaccard) == (1, 1, 1)
        assert overlap.jaccard_interval == (1, 1)
        assert overlap.new == overlap.lost == ()
    for overlap in found.groups:
        assert overlap.correlation == pytest.approx(1)
        assert overlap.correlation_interval == pytest.approx((1, 1))


def test_the_seed_decides_the_intervals() -> None:
    first, same, other = (compare(BASE, TUNED, seed=seed, draws=50) for seed in (0, 0, 1))
    # By their text, in which what is undefined equals itself.
    assert repr(first) == repr(same)
    assert first.groups != other.groups


def test_sizes_are_read_off_the_circuits() -> None:
    apart = tuple(stage for stage in ENTITY_TRACKING_STAGES if stage.group != "pos_transmitter")
    both = [discovery(seed, stages=apart) for seed in (0, 1)]
    read, given = (compare(*both, seed=0, draws=50, sizes=some) for some in (None, SIZES))
    assert repr(read) == repr(given)


def test_heads_are_told_with_their_place_in_both() -> None:
    found = compare(BASE, discovery(1, tops={**TOPS, "pos_transmitter": 2}), seed=0)
    table = found.to_dataframe()
    assert table["group"].tolist() == [*SIZES, WHOLE_CIRCUIT]
    assert (table["shared"] + table["new"].str.split().str.len() == table["tuned_heads"]).all()
    heads = found.heads_dataframe()
    ranked = BASE.scores["pos_detector"].ranked()
    for row in heads[heads["group"] == "pos_detector"].itertuples():
        head = Head.parse(row.head)
        assert ranked[row.base_rank - 1] == head
        assert row.base_score == pytest.approx(BASE.scores["pos_detector"].scores[head].item())
        assert row.in_base == (head in BASE.circuit.pos_detector)
    unreached = [h for h in found.heads if h.group == "pos_transmitter" and h.head.layer == 2]
    for head in unreached:
        assert head.tuned_rank is None
        assert math.isnan(head.tuned_score)
        assert head.in_base and not head.in_tuned


def test_planted_circuits_of_two_models_are_one() -> None:
    pairs = planted_pairs(12)
    base, tuned = planted_model(), planted_model()
    for block in tuned.blocks:
        block.mlp.W_out.data *= 0.5
    both = [
        discover_circuit(model, pairs, sizes={"copier": 1, "note_taker": 1}, stages=STAGES)
        for model in (base, tuned)
    ]
    means = torch.zeros(2, 8, 4, 19)
    faithfulness = {
        "base circuit in tuned": Faithfulness.of(
            evaluate(tuned, pairs.clean, keep=both[0].circuit, mean_outputs=means),
            evaluate(tuned, pairs.clean),
            seed=0,
        )
    }
    found = compare(*both, seed=0, paired=True, faithfulness=faithfulness)
    assert found.whole.shared == (("last", COPY), ("value", NOTE))
    assert found.whole.jaccard_interval == (1, 1)
    table = found.faithfulness_dataframe()
    assert table["circuit"].tolist() == ["base circuit in tuned"]
    assert table["faithfulness"].tolist() == [faithfulness["base circuit in tuned"].value]


def test_groups_without_heads_have_no_share() -> None:
    nothing = {**TOPS, "struct_reader": 0}
    both = [discovery(seed, tops=nothing) for seed in (0, 1)]
    found = compare(*both, seed=0)["struct_reader"]
    assert found.shared == found.new == found.lost == ()
    for value in (found.jaccard, found.recall, found.correlation, found.chance_jaccard):
        assert math.isnan(value)
    assert found.p_value == 1


def test_discoveries_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="same groups"):
        compare(BASE, discovery(1, stages=ENTITY_TRACKING_STAGES[:2]), seed=0)
    wide = HeadScores(torch.zeros(4, 5, 12), torch.zeros(12), "last", None, None, "exact")
    other = Discovery(TUNED.circuit, {**TUNED.scores, "value_fetcher": wide}, {})
    with pytest.raises(InputError, match=r"of \(4, 3\) and \(4, 5\) layers and heads"):
        compare(BASE, other, seed=0)
    worst = BASE.scores["pos_detector"].ranked()[-1]
    groups = tuple(
        Group(g.name, g.position, (worst,) if g.name == "pos_detector" else g.heads)
        for g in BASE.circuit
    )
    chosen = Discovery(Circuit(groups), BASE.scores, {})
    with pytest.raises(InputError, match="pos_detector are not the 6 most important"):
        compare(chosen, TUNED, seed=0)
    groups = tuple(
        Group(g.name, g.position, (Head(3, 0),) if g.name == "pos_detector" else g.heads)
        for g in BASE.circuit
    )
    with pytest.raises(InputError, match="L3H0 of pos_detector can't reach"):
        compare(Discovery(Circuit(groups), BASE.scores, {}), TUNED, seed=0)
    with pytest.raises(InputError, match="12 and 9 pairs are not the same"):
        compare(BASE, discovery(1, n_pairs=9), seed=0, paired=True)
    with pytest.raises(InputError, match="not the 1 most important"):
        compare(BASE, TUNED, seed=0, sizes={**SIZES, "pos_detector": 1})
