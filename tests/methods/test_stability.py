"""Which nodes are found again, and what chance would find again."""

from itertools import combinations, product

import numpy as np
import pytest

from tl_entity import (
    InputError,
    MechanismComparison,
    MechanismStability,
    Node,
    compare_mechanisms,
    mechanism_stability,
)
from tl_entity.stats import shared_by_all

ROLES = ("a", "b")
CANDIDATES = [Node(layer, head, r) for layer in range(2) for head in range(4) for r in ROLES]
ALWAYS, OFTEN, ONCE, NEVER = (Node(0, head, "a") for head in range(4))
SEARCHES = {
    "first": [ALWAYS, OFTEN],
    "seed 1": [ALWAYS, OFTEN, ONCE],
    "zero": [OFTEN, ALWAYS],
    "resample": [ALWAYS],
}
CHANGED = {"seed 1": "seed", "zero": "ablation", "resample": "ablation"}


@pytest.fixture
def found() -> MechanismStability:
    return mechanism_stability(SEARCHES, changed=CHANGED, candidates=CANDIDATES)


def test_nodes_stand_by_how_often_they_are_found(found) -> None:
    assert found.times == {ALWAYS: 4, OFTEN: 3, ONCE: 1}
    assert (found.core, found.contingent, found.noise) == ((ALWAYS,), (OFTEN,), (ONCE,))
    assert [found.standing(n) for n in (ALWAYS, OFTEN, ONCE, NEVER)] == [
        "core",
        "contingent",
        "noise",
        None,
    ]
    assert found.jaccard == pytest.approx({"seed 1": 2 / 3, "zero": 1.0, "resample": 0.5})
    assert "seed 0.67; ablation 1.00, 0.50" in str(found)
    rows = found.searches_dataframe().set_index("search")
    assert rows.loc["seed 1", ["nodes", "core", "contingent", "noise"]].tolist() == [3, 1, 1, 1]
    assert found.to_dataframe()["standing"].tolist() == ["core", "contingent", "noise"]


def test_any_two_searches_are_shown_beside_each_other(found) -> None:
    figure = found.plot()
    (cells,) = figure.data
    # Rows are numbered from below and named by the axis's ticks.
    names = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    rows = {names[at]: row for at, row in zip(cells.y, np.array(cells.z, float), strict=True)}
    np.testing.assert_allclose(rows["first"], [1, 2 / 3, 1, 1 / 2])
    np.testing.assert_allclose(rows["seed 1"], [2 / 3, 1, 2 / 3, 1 / 3])
    assert "1 core, 1 contingent, 1 noise" in figure.layout.title.text


def test_it_is_kept_and_read(found, tmp_path) -> None:
    found.save(tmp_path / "found.safetensors")
    assert MechanismStability.load(tmp_path / "found.safetensors") == found


def test_what_all_share_by_counting_every_choice() -> None:
    sizes, counts = (3, 2, 3), np.zeros(4)
    for chosen in product(*(list(combinations(range(5), size)) for size in sizes)):
        counts[len(set.intersection(*map(set, chosen)))] += 1
    chance = shared_by_all(5, sizes)
    np.testing.assert_allclose(chance.probabilities, counts / counts.sum())
    with pytest.raises(ValueError, match="can't be chosen"):
        shared_by_all(2, [1, 3])
    with pytest.raises(ValueError, match="Without a choice"):
        shared_by_all(2, [])


def test_chance_is_drawn_within_layers_and_roles(found) -> None:
    """All nodes of layer 0 at `a`: 2, 3, 2 and 1 of the 4 there."""
    assert found.chance.expected == pytest.approx(4 * (2 * 3 * 2 * 1) / 4**4)
    elsewhere = {"one": [Node(0, 0, "a")], "two": [Node(1, 0, "a")]}
    assert mechanism_stability(elsewhere, candidates=CANDIDATES).chance.expected == 0


def test_a_comparison_shows_what_the_searches_settle(found, tmp_path) -> None:
    tuned = mechanism_stability(
        {"first": [NEVER, OFTEN, ONCE], "again": [ONCE, NEVER]}, candidates=CANDIDATES
    )
    both = {"base": found, "tuned": tuned}
    compared = compare_mechanisms(
        SEARCHES["first"], tuned.found["first"], candidates=CANDIDATES, again=both
    )
    # ONCE is core in the fine-tune, but not gained for sure: one of the base's searches has it.
    assert compared.settled == {"kept": (), "lost": (ALWAYS,), "gained": (NEVER,)}
    assert compared.ceiling["base, resample"].jaccard == 0.5
    assert compared.ceiling["tuned, again"].jaccard == pytest.approx(2 / 3)
    assert "base in 4 searches: 1 core, 1 contingent, 1 noise" in str(compared)
    rows = compared.nodes_dataframe().set_index("node")
    assert rows.loc[str(OFTEN)].tolist()[2:] == ["shared", "contingent", "contingent"]
    assert rows.loc[str(ALWAYS), "tuned standing"] == "never found"
    compared.save(tmp_path / "compared.safetensors")
    assert MechanismComparison.load(tmp_path / "compared.safetensors") == compared


def test_another_phrasing_may_have_roles_of_its_own() -> None:
    other = [*SEARCHES["first"], Node(1, 0, "comma")]
    again = mechanism_stability(
        {"first": SEARCHES["first"], "commas": other},
        candidates=[*CANDIDATES, Node(1, 0, "comma"), Node(1, 1, "comma")],
    )
    compared = compare_mechanisms(
        SEARCHES["first"], [ALWAYS], candidates=CANDIDATES, again={"base": again}
    )
    assert compared.ceiling["base, commas"].jaccard == pytest.approx(2 / 3)
    assert compared.settled is None


def test_what_says_nothing_is_refused(found) -> None:
    with pytest.raises(InputError, match="One search says nothing"):
        mechanism_stability({"first": [ALWAYS]}, candidates=CANDIDATES)
    with pytest.raises(InputError, match="give them as candidates"):
        mechanism_stability(SEARCHES)
    with pytest.raises(InputError, match="L0H0@c is none of the candidates"):
        mechanism_stability({"first": [Node(0, 0, "c")], "other": [ALWAYS]}, candidates=CANDIDATES)
    with pytest.raises(InputError, match="no search 'nothing'"):
        mechanism_stability(SEARCHES, changed={"nothing": "seed"}, candidates=CANDIDATES)
    with pytest.raises(InputError, match="has other nodes than the mechanism"):
        compare_mechanisms([ONCE], [ALWAYS], candidates=CANDIDATES, again={"base": found})
