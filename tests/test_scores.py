"""Scores say where they are, which matter, and are drawn as what they are."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.methods.planted import COPY, STAGES, planted_model, planted_pairs
from tl_entity import InputError, discover_circuit, path_patch, path_patch_mlps
from tl_entity.heads import Head
from tl_entity.methods.path_patching import HeadScores
from tl_entity.metrics import LOG_PROBABILITY, LOGIT_DIFFERENCE, RELATIVE_PROBABILITY
from tl_entity.scores import Scores

WORDS = ("the", "bell", "the")


def by_token(sign=-1, metric="logit difference") -> Scores:
    """Two layers, three tokens, two examples; means -2, 0, 1 and 3, -0.5, 0."""
    means = torch.tensor([[-2.0, 0.0, 1.0], [3.0, -0.5, 0.0]])
    per_example = torch.stack([means - 1, means + 1], -1)
    axes = {"layer": ("0", "1"), "token": WORDS}
    return Scores(per_example, axes, metric, sign, "patched residual")


def test_places_are_ranked_by_the_sign():
    low, high = by_token(), by_token(sign=1)
    assert low.top(2) == [(0, 0), (1, 1)]
    assert high.top(2) == [(1, 0), (0, 2)]
    # Ties in order.
    assert low.ranked()[2:4] == [(0, 1), (1, 2)]
    assert str(low) == (
        "patched residual, 2 examples; most important by logit difference: layer 0, token the "
        "-2.000"
    )


def test_a_row_a_place_with_names_of_the_axes():
    rows = by_token().to_dataframe()
    assert list(rows.columns) == ["layer", "token", "score", "low", "high", "rank"]
    assert rows["token"].tolist() == [*WORDS, *WORDS]
    assert rows["rank"].tolist() == [1, 3, 5, 6, 2, 4]
    # The mean of -3 and -1: a standard error of 1, so 1.96 to either side.
    first = rows.iloc[0]
    assert (first["score"], first["low"], first["high"]) == pytest.approx(
        (-2, -3.96, -0.04), abs=1e-3
    )
    assert by_token().table(1)["score"].tolist() == [-2.0]


def test_scores_come_back_from_their_file(tmp_path):
    by_token().save(tmp_path / "scores")
    found = Scores.load(tmp_path / "scores")
    assert found.axes == by_token().axes and found.sign == -1
    assert torch.equal(found.per_example, by_token().per_example)
    assert found.to_json()["axes"][1] == {"name": "token", "places": list(WORDS)}
    assert found.to_json()["scores"] == [[-2.0, 0.0, 1.0], [3.0, -0.5, 0.0]]


@pytest.mark.parametrize(
    "axes", [{"layer": ("0", "1")}, {"layer": ("0",), "token": WORDS}, {"token": WORDS, "a": "bc"}]
)
def test_axes_that_do_not_fit_are_refused(axes):
    axes = {name: tuple(places) for name, places in axes.items()}
    with pytest.raises(InputError, match=r"Scores of shape \(2, 3, 2\) have no axes"):
        Scores(by_token().per_example, axes, "logit difference", -1, "x")
    with pytest.raises(InputError, match="name each of the others"):
        Scores.numbered(by_token().per_example, ("layer",), metric="m", sign=1, about="x")


def test_a_heatmap_names_its_metric_and_is_not_cut_at_one():
    (trace,) = by_token().plot().data
    assert trace.colorbar.title.text == "logit difference"
    assert (trace.zmin, trace.zmax) == (-3, 3) and not trace.reversescale
    assert trace.z.tolist() == [[-2.0, 0.0, 1.0], [3.0, -0.5, 0.0]]
    assert by_token(sign=1).plot().data[0].reversescale
    (bounded,) = by_token(metric=RELATIVE_PROBABILITY.name).plot().data
    assert (bounded.zmin, bounded.zmax) == (-1, 1)
    # A word that comes twice has a place for each.
    assert list(by_token().plot().layout.xaxis.ticktext) == list(WORDS)
    assert "layer 1, token bell" in trace.customdata[1][1]


def test_one_axis_is_bars_and_three_are_refused():
    along = Scores.numbered(
        torch.tensor([[1.0, 3.0], [-1.0, -3.0]]), ["layer"], metric="m", sign=1, about="x"
    )
    (bars,) = along.plot().data
    assert list(bars.y) == [2.0, -2.0] and along.plot().layout.yaxis.title.text == "m"
    cube = Scores.numbered(torch.zeros(2, 2, 2, 3), "abc", metric="m", sign=1, about="x")
    with pytest.raises(InputError, match="these scores have 3: a, b, c"):
        cube.plot()
    assert len(cube.to_dataframe()) == 8


def test_scores_of_heads_and_mlps_are_scores():
    model, pairs = planted_model(), planted_pairs(12)
    heads = path_patch(model, pairs, metric=LOG_PROBABILITY)
    named = heads.named
    assert list(named.axes) == ["layer", "head"] and named.sign == -1
    assert Head(*named.top(1)[0]) == heads.top(1)[0] == COPY
    assert torch.equal(named.scores, heads.scores)
    assert np.array_equal(named.intervals, heads.intervals)
    mlps = path_patch_mlps(model, pairs)
    assert list(mlps.named.axes) == ["layer"]
    assert torch.equal(mlps.named.scores, mlps.scores)


def scaled(found: HeadScores, factor: float, metric: str) -> HeadScores:
    return dataclasses.replace(found, per_example=found.per_example * factor, metric=metric)


def test_a_discovery_by_logit_difference_is_not_cut_at_one():
    model, pairs = planted_model(), planted_pairs(12)
    found = discover_circuit(model, pairs, sizes={"copier": 1, "note_taker": 1}, stages=STAGES)
    name = LOGIT_DIFFERENCE.name
    large = {group: scaled(scores, 20.0, name) for group, scores in found.scores.items()}
    maps = [t for t in dataclasses.replace(found, scores=large).plot().data if t.name == "scores"]
    for trace, scores in zip(maps, large.values(), strict=True):
        assert trace.zmax >= float(scores.scores.abs().max()) > 1
        assert trace.colorbar.title.text == "logit difference"
    (trace,) = [t for t in large["copier"].plot().data if t.name == "scores"]
    assert trace.zmax == pytest.approx(float(large["copier"].scores.abs().max()))
    assert math.isclose(found.scores["copier"].plot().data[0].zmax, 1.0, abs_tol=0.2)
