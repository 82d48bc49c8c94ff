"""Figures and tables of what the main job's own tests have no example of."""

from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.settings import GROUPS
from tl_entity.study.tables import tables_of


def model(**more):
    """A model's part of the results: one head a group, and what is given."""
    stages = {
        stage.group: {
            "position": stage.position,
            "into": stage.into,
            "receiver_input": stage.receiver_input,
            "scores": [[-0.5]],
        }
        for stage in ENTITY_TRACKING_STAGES
    }
    circuit = {group: [[0, 0]] for group in GROUPS}
    known = {"label": "base", "accuracy": {}, "no_circuit": None}
    return {**known, "circuit": circuit, "discovery": stages, **more}


def results(**more):
    return {
        "models": {"base": model()},
        **dict.fromkeys(("same_circuit", "control")),
        "cmap": {},
        "verdict": [],
        **more,
    }


def judged(group, head, score, interval):
    share = {"accuracy": 0.5, "correct": 1, "prompts": 2, "interval": [0.2, 0.8]}
    return {
        "group": group, "head": head, "score": score, "interval": interval, "kept": True,
        "removed": [], "without_removed": share, "without_head": share,
    }  # fmt: skip


def test_minimality_without_an_end_reaches_to_the_top_and_says_so():
    entries = [
        judged("value_fetcher", [1, 0], 0.5, [0.2, 3.0]),
        judged("value_fetcher", [1, 1], 2.0, [1.5, "infinite"]),
        judged("pos_detector", [0, 2], "infinite", [4.0, "infinite"]),
    ]
    minimality = {"ablation": "pooled", "entries": entries}
    both = {**minimality, "by_index": {"ablation": "index", "entries": entries[:1]}}
    found = results(models={"base": model(minimality=both)})
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


def overlap(jaccard):
    return {
        "first": 2, "second": 2, "shared": [[0, 0]], "only_first": [], "only_second": [],
        "shared_by_chance": 0.5, "p_value": 0.1, "population": 9,
        "jaccard": jaccard,
        "jaccard_by_chance": 0.2, "jaccard_by_chance_interval": [0.0, 0.3],
        "precision": 0.6, "recall": 0.7, "rank_correlation": None,
    }  # fmt: skip


def test_the_comparison_shows_each_group_beside_chance():
    groups = {group: overlap(0.5) for group in GROUPS}
    # A group without heads in either circuit has nothing to compare.
    groups["struct_reader"] = overlap(None)
    same = {"groups": groups, "whole": overlap(0.4), "paired": True, "ceiling": None}
    found = results(
        models={"base": model(), "tuned": model() | {"label": "tuned"}}, same_circuit=same
    )
    circuits, random = mechanism_figures(found)["comparison"].data
    names = ["A value_fetcher", "B pos_transmitter", "C pos_detector", "whole circuit"]
    assert list(circuits.x) == list(random.x) == names
    assert list(circuits.y) == [0.5, 0.5, 0.5, 0.4]
    # The index has no interval, and none is drawn.
    assert circuits.customdata[3] == "0.400" and circuits.error_y.visible is False
    assert random.error_y.visible is not False
    assert random.customdata[0] == "0.200 [0.000, 0.300]"
    row = tables_of(found)["comparison"].iloc[-1]
    assert (row["precision"], row["recall"]) == (0.6, 0.7)
    assert not {"precision_low", "jaccard_low", "ceiling_jaccard"} & set(row.index)
    assert (row["jaccard_by_chance"], row["jaccard_by_chance_high"]) == (0.2, 0.3)
    again = {"groups": {g: overlap(0.8) for g in GROUPS}, "whole": overlap(0.7)}
    found["same_circuit"]["ceiling"] = again
    circuits, twice, random = mechanism_figures(found)["comparison"].data
    assert twice.name == "the base found twice" and list(twice.x) == names
    assert list(twice.y) == [0.8, 0.8, 0.8, 0.7] and twice.error_y.visible is False
    assert tables_of(found)["comparison"].iloc[-1]["ceiling_jaccard"] == 0.7
