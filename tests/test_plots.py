"""The figures show what they are given."""

import json
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from tl_entity.heads import Head
from tl_entity.plots.bars import Bar, accuracy_bars, add_level, grouped_bars
from tl_entity.plots.heatmaps import (
    HeadMap,
    attention_heatmap,
    colour_limit,
    head_heatmap,
    shared_limits,
    stage_heatmaps,
)
from tl_entity.plots.render import figure_html, figure_png


def panel(layers=3, heads=4, *, scale=0.5, error=0.1, top_layer=2, seed=0, **more) -> HeadMap:
    scores = np.random.default_rng(seed).uniform(-scale, scale, (layers, heads))
    scores[top_layer:] = 0
    intervals = np.stack([scores - error, scores + error], -1)
    return HeadMap("title", scores, intervals, top_layer=top_layer, **more)


def traces(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def test_heatmap_shows_the_scores_with_symmetric_colours_and_layer_0_at_the_bottom():
    given = panel()
    figure = head_heatmap(given)
    (scores,) = traces(figure, "scores")
    assert np.array_equal(scores.z, given.scores)
    assert scores.zmin == -scores.zmax == -np.abs(given.scores).max()
    low, high = figure.layout.yaxis.range
    assert low < 0 < high


def test_heatmap_outlines_the_chosen_and_dots_the_known_heads():
    chosen, known = (Head(0, 1), Head(1, 3)), (Head(1, 0),)
    figure = head_heatmap(panel(chosen=chosen, known=known))
    (outline,) = traces(figure, "chosen")
    squares = [list(zip(outline.x, outline.y, strict=True))[i : i + 5] for i in (0, 6)]
    centres = [tuple(np.mean(square[:4], 0)) for square in squares]
    assert centres == [(head.head, head.layer) for head in chosen]
    (dots,) = traces(figure, "known")
    assert list(zip(dots.x, dots.y, strict=True)) == [(0, 1)]


def test_hover_names_the_head_its_score_and_its_interval():
    given = panel(chosen=(Head(1, 3),))
    (scores,) = traces(head_heatmap(given), "scores")
    text = scores.customdata[1][3]
    assert "L1H3" in text and "chosen" in text
    for number in (given.scores[1, 3], *given.intervals[1, 3]):
        assert f"{number:+.4f}" in text
    assert "cannot reach" in scores.customdata[2][0]


@pytest.mark.parametrize(("top_layer", "hatched"), [(2, (1.5, 2.5)), (0, (-0.5, 2.5)), (3, None)])
def test_layers_that_cannot_reach_are_hatched(top_layer, hatched):
    found = traces(head_heatmap(panel(top_layer=top_layer)), "cannot reach")
    assert [(min(t.y), max(t.y)) for t in found] == ([] if hatched is None else [hatched])


def test_one_far_outlier_does_not_turn_the_others_pale():
    scores = np.array([[-0.4, 30.0]])
    assert colour_limit([HeadMap("", scores)]) == 1.0
    assert colour_limit([HeadMap("", np.zeros((2, 2)))]) == 1.0


def test_stages_share_a_scale_unless_theirs_are_too_different():
    strong, weak = panel(scale=0.8), panel(scale=0.4)
    weaker = panel(scale=0.01, error=0.001)
    both = shared_limits([[strong], [weak]])
    assert both == [colour_limit([strong])] * 2
    assert shared_limits([[strong], [weaker]]) == [colour_limit([strong]), colour_limit([weaker])]
    figure = stage_heatmaps([strong, weak], title="")
    assert [t.showscale for t in traces(figure, "scores")] == [True, False]
    figure = stage_heatmaps([strong, weaker], title="")
    assert [t.zmax for t in traces(figure, "scores")] == [
        colour_limit([strong]),
        colour_limit([weaker]),
    ]


def test_noise_is_not_drawn_as_dark_as_what_is_strong():
    """The largest of many scores of nothing is a few standard errors from 0."""
    strong, noise = panel(scale=0.8), panel(scale=0.01, error=0.01)
    assert shared_limits([[strong], [noise]]) == [colour_limit([strong])] * 2
    # Of one model noise, of another not.
    weak = panel(scale=0.01, error=0.001)
    assert shared_limits([[strong], [noise, weak]])[1] == colour_limit([weak])
    # Of a single pair nothing is known of the noise.
    unknown = panel(scale=0.01, error=float("nan"))
    assert shared_limits([[strong], [unknown]])[1] == colour_limit([unknown])


def test_the_colour_bar_names_the_metric_and_only_a_bounded_one_is_cut():
    scores = np.array([[-0.4, 30.0]])
    assert colour_limit([HeadMap("", scores, metric="logit difference", bound=None)]) == 30
    figure = head_heatmap(HeadMap("", scores, metric="logit difference", bound=None))
    (trace,) = traces(figure, "scores")
    assert trace.colorbar.title.text == "logit difference" and trace.zmax == 30
    assert "logit difference +30.0000" in trace.customdata[0][1]
    both = stage_heatmaps([panel(metric="m"), panel(metric="m", scale=0.01, error=0.001)], title="")
    assert [t.colorbar.title.text for t in traces(both, "scores")] == ["m", "m"]


@pytest.mark.parametrize("shape", [(4, 4), (80, 64)])
def test_small_and_large_models_get_readable_axes(shape):
    layers, heads = shape
    figure = stage_heatmaps([panel(layers, heads, top_layer=layers)] * 4, title="")
    assert len(traces(figure, "scores")) == 4
    assert layers / figure.layout.yaxis.dtick <= 16
    assert heads / figure.layout.xaxis4.dtick <= 16
    assert 300 < figure.layout.height < 1700


def test_bars_carry_their_intervals():
    figure = accuracy_bars({"a": {2: Bar(0.9, 0.8, 0.95), 3: Bar(0.5, 0.4, 0.7)}}, title="")
    bars = figure.data[0]
    assert bars.y == (0.9, 0.5)
    assert bars.error_y.array == pytest.approx((0.05, 0.2))
    assert bars.error_y.arrayminus == pytest.approx((0.1, 0.1))
    assert list(figure.data[1].y) == [1 / 2, 1 / 3]


def test_a_table_of_no_heads_says_so():
    figure = attention_heatmap([], ["x", "y"], np.zeros((0, 2)), title="what they attend to")
    assert not figure.data
    assert [note.text for note in figure.layout.annotations] == ["there are none"]
    assert figure.layout.margin.t and figure.layout.title.text == "what they attend to"


def test_attention_rows_read_from_top_to_bottom():
    weights = np.array([[1.0, 0.0], [0.25, np.nan]])
    figure = attention_heatmap(["first", "second"], ["x", "y"], weights, title="")
    axis = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    z = {axis[y]: row for y, row in zip(figure.data[0].y, figure.data[0].z, strict=True)}
    assert list(z["first"]) == [1.0, 0.0]
    assert axis[max(axis)] == "first"


def test_text_in_a_figure_cannot_end_its_script():
    figure = accuracy_bars({"</script><img>": {2: Bar(1, 1, 1)}}, title="")

    class Reader(HTMLParser):
        tags: list[str]

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)

    reader = Reader()
    reader.tags = []
    html = figure_html(figure, "name")
    reader.feed(html)
    assert reader.tags == ["div", "script"]
    content = html.split("const f=")[1].split(";const draw=")[0]
    assert json.loads(content)["data"][0]["name"] == "</script><img>"


def test_png_without_a_browser():
    picture = figure_png(head_heatmap(panel()), width=300, height=200)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (600, 400)


def levels(*named):
    """The names beside levels, and the margin they have."""
    figure = grouped_bars({"a": {"b": Bar(0.5, 0.4, 0.6)}}, title="title")
    for name, value in named:
        add_level(figure, name, Bar(value, value, value))
    return figure.layout.annotations, figure.layout.margin.r


def test_long_names_of_levels_are_broken_into_lines_that_fit_the_margin():
    name = "qwen + qwen2.5-coder-0.5b-instruct-skills"
    (label,), margin = levels((name, 0.7))
    lines = label.text.split("<br>")
    assert "".join(lines).replace(" ", "") == name.replace(" ", "") + "0.700"
    # Twelve pixels high, a letter is no wider than eight.
    assert max(map(len, lines)) * 8 <= margin + 10 < 180
    (short,), least = levels(("base", 0.7))
    assert short.text == "base<br>0.700" and least == 120
    (whole,), _ = levels(("x" * 40, 0.7))
    assert max(map(len, whole.text.split("<br>"))) <= 18


def test_names_of_close_levels_do_not_cover_each_other():
    for first, second in ((0.5, 0.55), (0.55, 0.5)):
        labels, _ = levels(("one", first), ("two", second))
        anchors = {label.y: label.yanchor for label in labels}
        assert anchors == {0.5: "top", 0.55: "bottom"}
