"""Figures and tables of what the main job's own tests have no example of."""

import math

from tests.study.made import answered, comparison, discovery, model, overlap, study
from tl_entity.heads import Circuit, Head
from tl_entity.methods.minimality import HeadMinimality, Minimality
from tl_entity.stats import Interval
from tl_entity.study.experiment_results import MinimalityByAblation
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.settings import GROUPS
from tl_entity.study.tables import tables_of


def judged(group, head, score, *interval):
    half = answered(1, n=2)
    return HeadMinimality(group, head, (), half, half, score, Interval(*interval), True)


def minimality(ablation, *heads):
    whole, half = discovery().circuit, answered(1, n=2)
    return Minimality(whole, Circuit(()), half, half, heads, {}, 0.01, 0.5, 0, ablation)


def test_minimality_without_an_end_reaches_to_the_top_and_says_so():
    heads = (
        judged("value_fetcher", Head(1, 0), 0.5, 0.2, 3.0),
        judged("value_fetcher", Head(1, 1), 2.0, 1.5, math.inf),
        judged("pos_detector", Head(0, 2), math.inf, 4.0, math.inf),
    )
    both = MinimalityByAblation(
        {"pooled": minimality("pooled", *heads), "index": minimality("index", *heads[:1])}
    )
    found = study(model(minimality=both))
    ends, says = {}, []
    for trace in mechanism_figures(found)["base_minimality"].data:
        for i, name in enumerate(trace.x):
            low = trace.y[i] - trace.error_y.arrayminus[i]
            ends[name] = (low, trace.y[i], trace.y[i] + trace.error_y.array[i])
            says.append(trace.customdata[i])
    assert ends == {"L1H0": (0.2, 0.5, 3.0), "L1H1 ↑": (1.5, 2.0, 3.0), "L0H2 ∞": (3.0, 3.0, 3.0)}
    assert says[1:] == ["200.0% [150.0%, ∞]", "∞ [400.0%, ∞]"]
    table = tables_of(found)["minimality"]
    assert table["high"].tolist() == [3.0, "infinite", "infinite", 3.0]
    assert table["ablation"].tolist() == [*["pooled"] * 3, "index"]


def test_minimality_is_one_drawing_wherever_it_is_shown():
    """The study's is the result's own, with letters for the groups."""
    heads = (judged("value_fetcher", Head(1, 0), 0.5, 0.2, 3.0),)
    one = minimality("pooled", *heads)
    shown = mechanism_figures(study(model(minimality=MinimalityByAblation({"index": one}))))
    study_own, own = shown["base_minimality"].data, one.plot().data
    assert [trace.name for trace in study_own] == ["A value_fetcher"]
    assert [trace.name for trace in own] == ["value_fetcher"]
    for trace, other in zip(study_own, own, strict=True):
        assert trace.update(name=other.name) == other


def test_the_comparison_shows_each_group_beside_chance():
    groups = [overlap(3, 3, name=group, expected=0.5) for group in GROUPS[:3]]
    # A group without heads in either circuit has nothing to compare.
    groups.append(overlap(0, name="struct_reader"))
    whole = overlap(6, 2, 4, expected=0.5)
    models = (model(), model("tuned"))
    found = study(*models, same=comparison(whole, *groups))
    circuits, random = mechanism_figures(found)["comparison"].data
    names = ["A value_fetcher", "B pos_transmitter", "C pos_detector", "whole circuit"]
    assert list(circuits.x) == list(random.x) == names
    assert list(circuits.y) == [0.5, 0.5, 0.5, 0.5]
    # The index has no interval, and none is drawn.
    assert circuits.customdata[3] == "0.500" and circuits.error_y.visible is False
    assert random.error_y.visible is not False
    # None or all by chance, so between 0 and what one shared head of so many gives.
    assert random.customdata[3].endswith(" [0.000, 0.059]")
    row = tables_of(found)["comparison"].iloc[-1]
    assert (row["precision"], row["recall"]) == (0.75, 0.6)
    assert not {"precision_low", "jaccard_low", "ceiling_jaccard"} & set(row.index)
    assert (row["shared_by_chance"], row["jaccard_by_chance_high"]) == (0.5, 1 / 17)
    again = (*(overlap(4, 1, name=group) for group in GROUPS), overlap(7, 3))
    found = study(*models, same=comparison(whole, *groups, ceiling=again))
    circuits, twice, random = mechanism_figures(found)["comparison"].data
    assert twice.name == "the base found twice" and list(twice.x) == names
    assert list(twice.y) == [0.8, 0.8, 0.8, 0.7] and twice.error_y.visible is False
    assert tables_of(found)["comparison"].iloc[-1]["ceiling_jaccard"] == 0.7
