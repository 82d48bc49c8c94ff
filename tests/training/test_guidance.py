"""The loss that plants the circuit, on attention worked out by hand."""

import math

import pytest
import torch

from tl_entity.heads import Head
from tl_entity.tasks.boxes import BoxPrompt, mark_sentence
from tl_entity.tasks.marked import tokenize_marked
from tl_entity.training.guidance import (
    DRAWN,
    N_HEADS,
    PLANTED,
    Link,
    attention_loss,
    mark_tokens,
    segment_numbers,
)
from tl_entity.training.tokenizer import build_tokenizer

PROMPT = BoxPrompt(objects=("apple", "bell"), labels=("E", "Q"), query_label="Q")


def marks_of(prompt: BoxPrompt):
    tokenizer = build_tokenizer()
    batch = tokenize_marked([mark_sentence(prompt.text)], tokenizer)
    words = tokenizer.convert_ids_to_tokens(batch.tokens[0].tolist())
    return mark_tokens(batch), words


def test_marks_stand_for_the_right_words():
    marks, words = marks_of(PROMPT)
    named = {
        name: [word for word, is_marked in zip(words, mark[0], strict=True) if is_marked]
        for name, mark in marks.items()
    }
    assert named["labels"] == ["E", "Q"]
    assert named["objects"] == ["apple", "bell"]
    assert named["separators"] == ["<s>", ","]
    assert named["segment_words"] == ["apple", "E", "bell", "Q"]
    assert named["query_label"] == named["previous_query_label"] == ["Q"]
    assert not (marks["labels"] & marks["query_label"]).any()


def test_segments_are_numbered_from_zero():
    marks, _ = marks_of(PROMPT)
    assert segment_numbers(marks)[marks["segment_words"]].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("away", "wanted"), [(False, 0.25), (True, 0.75)])
def test_loss_is_the_log_of_the_attention_that_goes_right(away, wanted):
    marks, words = marks_of(PROMPT)
    n = len(words)
    attention = torch.zeros(1, 2, n, n)
    attention[..., 0] = 1
    last, target = marks["last"][0].nonzero().item(), marks["query_label"][0].nonzero().item()
    attention[0, 1, last, target] = 0.25
    attention[0, 1, last, 0] = 0.75
    link = Link((Head(0, 1),), "last", "query_label")
    loss = attention_loss([attention], [link], marks, away=away)
    assert loss.item() == pytest.approx(-math.log(wanted), rel=1e-5)


def test_heads_of_a_group_lie_in_one_layer_and_share_no_key_value_head():
    for group in PLANTED:
        assert len({head.layer for head in group.heads}) == 1
        assert len({head.head // 2 for head in group.heads}) == len(group.heads)
        assert all(head.head < N_HEADS for head in group.heads)


def test_every_planted_group_is_drawn_somewhere():
    assert {heads for link in DRAWN for heads in link.heads} == {
        head for group in PLANTED for head in group.heads
    }
