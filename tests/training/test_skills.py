"""The texts that a real model is fine-tuned on: right answers, and nothing of the box task."""

import random
import re
import string
from collections import Counter

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.random_models import word_tokenizer
from tl_entity.errors import InputError
from tl_entity.tasks.nouns import OBJECTS
from tl_entity.training.skills import (
    FORMS,
    OPERATIONS,
    SKILLS,
    arithmetic,
    choose_kinds,
    lookup,
    skill_batch,
)
from tl_entity.training.texts import IGNORED

N_TEXTS = 300


def text(kind: str, seed: int) -> str:
    return "".join(piece.words for piece in SKILLS[kind](random.Random(seed)))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and none special."""
    tokenizer = Tokenizer(
        models.WordLevel({sign: i for i, sign in enumerate(string.printable)}, unk_token="\x0b")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def definitions_in(table: str) -> dict[str, str]:
    """Variables and values, read without knowing the form."""
    found = re.findall(r"(?:set )?'?\b([a-z])\b'?(?: = | -> |: | )'?(\w+)'?", table)
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


@pytest.mark.parametrize("kind", SKILLS)
def test_the_box_task_is_in_no_text(kind):
    words = Counter()
    for seed in range(N_TEXTS):
        words.update(re.findall(r"\w+", text(kind, seed).lower()))
    assert not {"box", "boxes", "contains", "contain"} & set(words)
    assert not set(OBJECTS) & set(words)


@pytest.mark.parametrize("kind", SKILLS)
def test_a_seed_gives_one_text_and_seeds_differ(kind):
    assert text(kind, 7) == text(kind, 7)
    assert len({text(kind, seed) for seed in range(50)}) > 45


def test_looked_up_values_are_those_defined():
    for seed in range(N_TEXTS):
        pieces = lookup(random.Random(seed))
        questions = [piece.words for piece in pieces if not piece.is_learned]
        answers = [piece.words for piece in pieces if piece.is_learned]
        # The first question follows the table in one piece.
        table, first = re.fullmatch(
            r"([\s\S]+?)(?:\. |\n)((?:get |assert |')?\w'?(?: = | -> |: | == )'?)", questions[0]
        ).groups()
        values = definitions_in(table)
        assert 3 <= len(values) <= 8 and len(set(values.values())) == len(values)
        asked = [re.search(r"\b([a-z])\b", part)[1] for part in (first, *questions[1:])]
        assert len(set(asked)) == len(asked) == len(answers) <= 3
        assert [values[name] for name in asked] == answers


def test_every_form_of_looking_up_is_used():
    signs = {"statement": r"\. \w = ", "arrow": "->", "command": "get", "program": "assert"}
    signs["mapping"] = r"\. '\w': "
    assert set(signs) == set(FORMS)
    for sign in signs.values():
        assert any(re.search(sign, text("lookup", seed)) for seed in range(N_TEXTS))


def test_results_of_arithmetic_are_right():
    seen = Counter()
    for seed in range(N_TEXTS):
        pieces = arithmetic(random.Random(seed))
        for problem, result in zip(pieces[::2], pieces[1::2], strict=True):
            assert result.is_learned and not problem.is_learned
            a, b = map(int, re.findall(r"\d+", problem.words))
            words = problem.words
            if re.search(r"\+|plus|Add", words):
                seen["addition"] += 1
                assert int(result.words) == a + b
            elif re.search("Take", words):
                seen["subtraction"] += 1
                assert int(result.words) == b - a >= 0
            elif re.search(r" - |minus", words):
                seen["subtraction"] += 1
                assert int(result.words) == a - b >= 0
            elif re.search(r"\*|times|Multiply", words):
                seen["multiplication"] += 1
                assert int(result.words) == a * b
            else:
                assert re.search(r"/|divided|Divide", words)
                seen["division"] += 1
                whole, _, rest = result.words.partition(" R ")
                assert int(whole) * b + int(rest or 0) == a and int(rest or 0) < b
                assert rest != "0"
    assert set(seen) == set(OPERATIONS) and min(seen.values()) > N_TEXTS / 3


def test_kinds_come_as_often_as_their_shares_say():
    mix = {"lookup": 2.0, "arithmetic": 1.0, "stories": 0.5}
    counts, generator = Counter(), random.Random(0)
    for _ in range(700):
        kinds = choose_kinds(mix, 8, generator)
        assert len(kinds) == 8
        for kind, share in mix.items():  # a step's own counts are within one of the share
            assert abs(kinds.count(kind) - 8 * share / 3.5) < 1
        counts.update(kinds)
    for kind, share in mix.items():
        assert counts[kind] / 5600 == pytest.approx(share / 3.5, abs=0.01)


def test_one_kind_alone():
    assert choose_kinds({"stories": 0.3}, 3, random.Random(0)) == ["stories"] * 3


def test_what_is_learned_is_what_the_pieces_say():
    tokenizer = letter_tokenizer()
    kinds = ["lookup", "arithmetic", "stories"] * 10
    tokens, targets = skill_batch(tokenizer, kinds, random.Random(5))
    generator = random.Random(5)
    for row, kind in enumerate(kinds):
        pieces = SKILLS[kind](generator)
        signs = [(sign, piece.is_learned) for piece in pieces for sign in piece.words]
        written = tokens[row, : len(signs)].tolist()
        assert "".join(string.printable[i] for i in written) == "".join(s for s, _ in signs)
        for place, (sign, is_learned) in enumerate(signs[1:]):
            expected = string.printable.index(sign) if is_learned else IGNORED
            assert targets[row, place] == expected
        assert (targets[row, len(signs) - 1 :] == IGNORED).all()


def test_a_word_the_tokenizer_lacks_is_named():
    with pytest.raises(InputError, match=r"no token for '\d+', which texts of the kind 'arith"):
        skill_batch(word_tokenizer(["+", "="]), ["arithmetic"], random.Random(0))
