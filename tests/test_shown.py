"""Prompts show themselves as text, with positions named and roles coloured."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from tests.random_models import random_model, word_tokenizer
from tests.test_marks import TEXTS, TOKENIZER, batches, roles_of
from tl_entity import (
    InputError,
    box_prompts,
    evaluate,
    load_tokenizer,
    marked_pairs,
    marked_prompts,
)
from tl_entity.tasks.shown import marked_text

KNOWN = "the [[thing|[[right|red cup]]]] on [[thing|door]] to [[asked|the]] table"


class Cells(HTMLParser):
    """The texts of a table's cells and headings, and the titles inside of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.titles: list[tuple[str, str]] = []
        self._into: list[str] | None = None
        self._title: str | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        assert tag in ("p", "b", "span", "sup", "div", "table", "tr", "td", "th"), tag
        if tag in ("td", "th"):
            self._into = self.cells if tag == "td" else self.headings
            self._into.append("")
        self._title = dict(attrs).get("title") if tag == "span" else None

    def handle_endtag(self, tag) -> None:
        self._title = None
        if tag in ("td", "th"):
            self._into = None

    def handle_data(self, data) -> None:
        if self._into is not None:
            self._into[-1] += data
        if self._title is not None:
            self.titles.append((data, self._title))


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_print_as_they_are_written(side) -> None:
    batch = batches()[side]
    assert [marked_text(batch, row) for row in range(3)] == [f"<s> {text}" for text in TEXTS]
    shown = repr(batch)
    assert all(text in shown for text in TEXTS) and "tensor" not in shown
    assert shown.startswith("PromptBatch: 3 prompts, 6 to 10 tokens\n")
    assert str(batch) == shown


def test_what_is_printed_can_be_read_again() -> None:
    tokenizer = word_tokenizer("the red cup on door to table".split(), bos=False)
    batch = marked_prompts(tokenizer, KNOWN, knowing="right")
    assert marked_text(batch, 0) == KNOWN
    again = marked_prompts(tokenizer, marked_text(batch, 0), knowing="right")
    assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.roles, batch.roles)
    assert "depend on what is asked: right, right.first, right.last" in repr(batch)


def test_a_batch_without_tokenizer_shows_token_ids() -> None:
    batch = replace(batches()["left"], tokenizer=None)
    ids = batch.tokens[1][batch.mask[1]].tolist()
    expected = f"{ids[0]} [[subject|{ids[1]}]] [[link|{ids[2]}]] {ids[3]} {ids[4]} {ids[5]}"
    assert marked_text(batch, 1) == expected
    assert f"answer {int(batch.answers[1])}" in repr(batch)
    assert str(ids[4]) in Cells(batch._repr_html_()).cells[2]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_notebook_shows_every_token_with_its_role(side) -> None:
    batch = batches()[side]
    page = Cells(batch._repr_html_())
    assert page.headings == ["prompt", "answer"] and page.cells[1::2] == ["are", "is", "is"]
    roles = [title.split(" · ")[1] for _, title in page.titles]
    assert roles == " ".join(roles_of(batch, row) for row in range(3)).split()
    words = [word for word, _ in page.titles]
    assert words[1:5] == ["the", "very", "old", "keys"]
    assert page.titles[2][1] == "token 2 · subject · subject"
    colours = {
        role: style
        for style, role in zip(
            [part.split(";")[0] for part in batch._repr_html_().split('style="background:')[1:]],
            [*batch.role_names, *roles],
            strict=True,
        )
    }
    assert len(set(colours.values())) == len(batch.role_names)


def test_what_is_shown_is_escaped() -> None:
    words = ["the", "<", "script", ">", "alert", "&"]
    batch = marked_prompts(word_tokenizer(words), "the [[<b>|<script>]] & alert", "script")
    page = batch._repr_html_()
    assert (
        "<script" not in page
        and "<b>|" not in page
        and '<sup style="opacity:.75">&lt;b&gt;' in page
    )
    assert Cells(page).titles[2] == ("<", "token 2 · <b> · <b>")


def test_pairs_show_both_prompts_answer_foil_and_probability() -> None:
    model = random_model()
    pairs = marked_pairs(
        TOKENIZER,
        TEXTS[:2],
        TEXTS[1:],
        answers=["is", "are"],
        targets=["are", "cup"],
        foils="is are".split(),
    )
    answered = evaluate(model, pairs.clean)
    shown = pairs.show(answered, n=1)
    page = Cells(shown._repr_html_())
    assert page.headings == [
        "clean",
        "corrupt",
        "answer",
        "target",
        "foil",
        "probability",
        "model says",
    ]
    said = TOKENIZER.decode([int(answered.predicted[0])])
    likely = f"{float(answered.answer_log_probability[0].exp()):.3f}"
    assert page.cells[2:] == ["is", "are", "is", likely, said]
    assert "1 of 2 shown" in shown._repr_html_() and "and 1 more" in repr(shown)
    assert f"corrupt: <s> {TEXTS[1]}  → answer is, target are, foil is" in repr(shown)
    assert likely in repr(shown)
    with pytest.raises(InputError, match="An evaluation of 2 prompts can't be shown beside 1"):
        pairs[:1].show(answered)


def test_box_prompts_and_long_batches() -> None:
    batch = box_prompts(load_tokenizer("default-base"), 40, n_boxes=3, seed=0)
    shown = repr(batch)
    assert shown.count("[[query_label|") == 5 and "and 35 more" in shown
    assert len(Cells(batch._repr_html_()).cells) == 20
    assert repr(batch[:0]).startswith("PromptBatch: 0 prompts") and batch[:0]._repr_html_()
