"""The texts the default pair is trained on."""

import random
from itertools import pairwise

import pytest
import torch

from tl_entity.tasks.boxes import mark_sentence
from tl_entity.training.texts import IGNORED, KINDS, text_batch
from tl_entity.training.tokenizer import build_tokenizer


def text_of(kind: str, seed: int) -> str:
    return " ".join(piece.words for piece in KINDS[kind](random.Random(seed)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_known_and_something_is_learned(kind):
    tokenizer = build_tokenizer()
    tokens, targets = text_batch(tokenizer, {kind: 1.0}, 20, random.Random(0))
    assert not (tokens == tokenizer.unk_token_id).any()
    assert ((targets != IGNORED).sum(-1) > 0).all()
    # What is to be predicted at a token is the token after it.
    at = (targets[:, :-1] != IGNORED).nonzero(as_tuple=True)
    assert torch.equal(targets[:, :-1][at], tokens[:, 1:][at])
    assert (targets[tokens == tokenizer.pad_token_id] == IGNORED).all()


def test_box_questions_ask_once_about_each_box_and_answer_right():
    for seed in range(20):
        description, *questions = text_of("box questions", seed).split(". Box ")
        asked = set()
        for question in questions:
            answered = mark_sentence(f"{description}. Box {question.rstrip(' .')}")
            assert answered.answer == question.rstrip(" .").split()[-1]
            asked.add(question.split()[0])
        assert len(asked) == len(questions) == description.count("Box")


def test_box_questions_learn_the_answers_alone():
    pieces = KINDS["box questions"](random.Random(3))
    asked = [before.words for before, piece in pairwise(pieces) if piece[1]]
    assert asked and all(words.endswith("contains the") for words in asked)


def test_look_up_answers_are_the_values_given():
    for seed in range(20):
        table, values = {}, []
        for part in text_of("look-up", seed).split(";"):
            words = part.split()
            if "=" in words:
                table[words[0]] = words[2]
            elif words:
                values.append((words[0], words[2]))
        assert 4 <= len(table) <= 10
        assert dict(values) == table


def test_calculations_are_right():
    for part in text_of("arithmetic", 0).split(";"):
        if part.strip():
            task, result = part.split("=")
            a, sign, b = task.split()
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
