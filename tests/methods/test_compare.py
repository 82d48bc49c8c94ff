"""Comparisons of circuits, counted by hand and drawn by drawn."""

import json
import math
from pathlib import Path

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
from tl_entity.stats import layered_overlap_by_chance, overlap_by_chance

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
        # Below zero beyond doubt, or no head would be chosen.
        means = torch.randn((N_LAYERS, N_HEADS, 1), generator=common) - 3
        per_example = means + noise * torch.randn(shape, generator=own)
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
        assert overlap.precision == len(ours & theirs) / len(ours)
        assert overlap.recall == len(ours & theirs) / len(theirs)
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
    """Four heads in the base and three in the tuned model, two in both: precision 2/4, recall 2/3,
    Jaccard 2/5. Of three heads a layer; the base has 3 in layer 0 and 1 in layer 1, the tuned model
    1 in layer 0 and 2 in layer 1."""
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
    assert (only.precision, only.recall, only.jaccard) == (1 / 2, 2 / 3, 2 / 5)
    assert only.population == 12
    # The one head in layer 0 is shared for sure, of those in layer 1 one with 2/3.
    assert only.chance.probabilities == pytest.approx((0, 1 / 3, 2 / 3))
    assert only.p_value == pytest.approx(2 / 3)
    assert only.chance_jaccard == pytest.approx(1 / 3 / 6 + 2 / 3 * 2 / 5)
    assert only.chance_interval == (1 / 6, 2 / 5)
    # Whatever the layers, of twelve heads 4 · 3 / 12 = 1 would be expected. C(12, 3) = 220 choices:
    # 4 share three, 6 · 8 = 48 share two, 4 · 28 = 112 one, 56 none.
    assert only.chance_over_all_layers.expected == pytest.approx(1)
    assert only.chance_over_all_layers.at_least(2) == pytest.approx(52 / 220)
    # Chosen by rank: there is no interval that would hold what it is of.
    for measure in ("precision", "recall", "jaccard", "correlation"):
        assert np.isnan(getattr(only, f"{measure}_interval")).all()
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
    assert "2 heads shared (1.7 by chance), 1 new, 2 lost" in str(only)
    assert "nan" not in str(found)


def test_only_heads_that_reach_in_both_can_be_shared() -> None:
    low = discovery(1, tops={**TOPS, "pos_transmitter": 2})
    found = compare(BASE, low, seed=0)
    overlap = found["pos_transmitter"]
    assert overlap.population == 6

    def in_layers(heads: tuple[tuple[Head, ...], tuple[Head, ...]], *layers: int) -> list[int]:
        return [sum(head.layer in layers for head in some) for some in heads]

    both = BASE.circuit.pos_transmitter, low.circuit.pos_transmitter
    assert overlap.chance == layered_overlap_by_chance(
        (3, *in_layers(both, layer)) for layer in range(3)
    )
    # What is chosen in layer 2 can't be shared.
    plain = overlap_by_chance(6, *in_layers(both, 0, 1))
    assert overlap.chance_over_all_layers.probabilities[: len(plain.probabilities)] == (
        pytest.approx(plain.probabilities)
    )
    # At the last token, whatever the group; then the other tokens.
    last = BASE.circuit.heads_at()["last"], low.circuit.heads_at()["last"]
    chance = layered_overlap_by_chance((3, *in_layers(last, layer)) for layer in range(4))
    # Over all layers: groups can choose in layers 0 and 1, then not all, then only one.
    over_all = [(6, *in_layers(last, 0, 1)), (3, *in_layers(last, 2)), (3, *in_layers(last, 3))]
    plain = layered_overlap_by_chance(over_all)
    for name in ("pos_detector", "struct_reader"):
        chance = chance.and_also(found[name].chance)
        plain = plain.and_also(found[name].chance_over_all_layers)
    assert found.whole.chance.probabilities == pytest.approx(chance.probabilities)
    assert found.whole.chance_over_all_layers.probabilities == pytest.approx(plain.probabilities)
    assert found.whole.population == 12 + 6 + 3


def test_a_discovery_is_the_same_as_itself() -> None:
    for paired in (True, False):
        found = compare(BASE, BASE, paired=paired)
        assert found.paired is paired
        for overlap in (*found.groups, found.whole):
            assert (overlap.precision, overlap.recall, overlap.jaccard) == (1, 1, 1)
            # No interval that would leave it out.
            assert np.isnan(overlap.jaccard_interval).all()
            assert overlap.new == overlap.lost == ()
        for overlap in found.groups:
            assert overlap.correlation == pytest.approx(1)


def test_the_base_found_again_is_the_ceiling() -> None:
    again = discovery(2, n_pairs=9)
    found = compare(BASE, TUNED, again=again)
    alone, beside = compare(BASE, TUNED), compare(BASE, again)
    assert repr(found.groups) == repr(alone.groups)
    assert repr(found.ceiling) == repr((*beside.groups, beside.whole))
    assert alone.ceiling == ()
    table = found.to_dataframe()
    assert table["ceiling_jaccard"].iloc[-1] == beside.whole.jaccard
    assert table["ceiling_shared"].tolist() == [len(o.shared) for o in found.ceiling]
    assert "ceiling_jaccard" not in alone.to_dataframe()
    assert f"found again shares {len(beside.whole.shared)}, Jaccard" in str(found)
    names = [trace.name for trace in found.plot().data]
    assert names == ["both circuits", "the base found twice", "drawn at random"]
    assert found.plot().data[1].y[-1] == beside.whole.jaccard


def test_nothing_is_drawn() -> None:
    first, other = compare(BASE, TUNED, seed=0, draws=50, sizes=SIZES), compare(BASE, TUNED)
    # By their text, in which what is undefined equals itself.
    assert repr(first) == repr(other)


def unrelated(generator: np.random.Generator, profile: np.ndarray) -> Discovery:
    """A circuit of random heads of a model of 24 layers and 14 heads, important where in depth the
    profile says."""
    sizes = dict(zip(SIZES, (12, 2, 7, 2), strict=True))
    tops = dict(zip(SIZES, (24, 22, 16, 14), strict=True))
    scores = {}
    for stage in ENTITY_TRACKING_STAGES:
        noise = generator.exponential(size=(24, 14)) * profile[:, None]
        per_example = torch.from_numpy(-noise)[..., None]
        top = tops[stage.group]
        per_example[top:] = 0
        receivers = None if top == 24 else (Head(top, 0),)
        scores[stage.group] = HeadScores(
            per_example, torch.zeros(1), stage.position, receivers, receivers and "q", "exact"
        )
    return Discovery(choose_heads(scores, sizes, ENTITY_TRACKING_STAGES), scores, {})


def test_unrelated_circuits_share_no_more_than_chance() -> None:
    """Whether or not they have in common where in depth important heads lie."""
    generator = np.random.default_rng(0)
    flat, hill = np.ones(24), np.exp(-(((np.arange(24) - 13) / 2.5) ** 2) / 2)
    for profile in (flat, hill):
        p_values: dict[str, list[float]] = {name: [] for name in (*SIZES, WHOLE_CIRCUIT, "plain")}
        beyond = []
        for _ in range(150):
            found = compare(unrelated(generator, profile), unrelated(generator, profile))
            for overlap in (*found.groups, found.whole):
                p_values[overlap.name].append(overlap.p_value)
            shared = len(found.whole.shared)
            beyond.append(shared - found.whole.chance.expected)
            p_values["plain"].append(found.whole.chance_over_all_layers.at_least(shared))
        # Whole numbers of heads: rather fewer than 5 %.
        for name in (*SIZES, WHOLE_CIRCUIT):
            assert np.mean(np.array(p_values[name]) < 0.05) <= 0.05, name
        assert abs(np.mean(beyond)) < 2 * np.std(beyond) / math.sqrt(150)
        # Drawn over all layers, a common profile alone looks like a finding.
        plain = np.mean(np.array(p_values["plain"]) < 0.01)
        assert plain > 0.25 if profile is hill else plain < 0.02


def kept_study(role: str) -> Discovery:
    """The circuit of a model of the study of Qwen2.5-Coder-0.5B, from its kept results."""
    found = json.loads((STUDY / "results.json").read_text(encoding="utf-8"))["models"][role]
    scores = {}
    for stage in ENTITY_TRACKING_STAGES:
        kept = found["discovery"][stage.group]
        receivers = kept["receivers"] and tuple(Head(*head) for head in kept["receivers"])
        scores[stage.group] = HeadScores(
            torch.tensor(kept["scores"], dtype=torch.float64)[..., None],
            torch.zeros(1),
            stage.position,
            receivers,
            kept["receiver_input"],
            "exact",
        )
    return Discovery(Circuit.entity_tracking(**found["circuit"]), scores, {})


STUDY = Path(__file__).parents[2] / "docs" / "studies" / "qwen"


def test_what_the_studys_circuits_share_by_chance() -> None:
    """As counted from the circuits layer by layer; over all layers it seemed a third of it."""
    found = compare(kept_study("base"), kept_study("tuned"))
    assert len(found.whole.shared) == 15
    assert found.whole.chance.expected == pytest.approx(3.93, abs=0.005)
    assert found.whole.chance_over_all_layers.expected == pytest.approx(1.31, abs=0.005)
    detectors = found["pos_detector"]
    assert len(detectors.shared) == 3
    assert detectors.p_value == pytest.approx(0.0661, abs=5e-5)
    assert detectors.chance_over_all_layers.at_least(3) == pytest.approx(0.00076, abs=5e-6)
    # Layers 9, 11, 12 and 13 of 14 heads: 1, 2, 1 and 3 heads in the base's circuit, and 1, 1, 1
    # and 4 in the other.
    assert detectors.chance.expected == pytest.approx((1 + 2 + 1 + 12) / 14)


def test_precision_and_recall_are_those_of_the_papers_notebooks() -> None:
    """Of Llama-7B's 40 heads of group A and FLoat-7B's 68, both have 27: .68 and .40."""
    stage = (Stage("value_fetcher", "last"),)
    both = []
    for first, size in ((0, 40), (13, 68)):
        flat = torch.ones(1024, 1)
        flat[first : first + size] = -1
        scores = {
            "value_fetcher": HeadScores(
                flat.view(32, 32, 1), torch.zeros(1), "last", None, None, "exact"
            )
        }
        both.append(Discovery(choose_heads(scores, {"value_fetcher": size}, stage), scores, {}))
    (found,) = compare(*both).groups
    assert (len(found.shared), len(found.lost), len(found.new)) == (27, 13, 41)
    assert round(found.precision, 3) == 0.675 and round(found.recall, 2) == 0.40


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
    # Heads may be chosen by another rule than rank.
    assert compare(chosen, TUNED)["pos_detector"].shared == (
        (("query_label", worst),) if worst in TUNED.circuit.pos_detector else ()
    )
    groups = tuple(
        Group(g.name, g.position, (Head(3, 0),) if g.name == "pos_detector" else g.heads)
        for g in BASE.circuit
    )
    with pytest.raises(InputError, match="L3H0 of pos_detector can't reach"):
        compare(Discovery(Circuit(groups), BASE.scores, {}), TUNED, seed=0)
    with pytest.raises(InputError, match="12 and 9 pairs are not the same"):
        compare(BASE, discovery(1, n_pairs=9), seed=0, paired=True)
    with pytest.raises(InputError, match="same groups"):
        compare(BASE, TUNED, again=discovery(1, stages=ENTITY_TRACKING_STAGES[:2]))
