"""Every desideratum's pairs, read back from their tokens by a reader that knows no template."""

from typing import NamedTuple

import pytest
import torch

from tests.random_models import word_tokenizer
from tl_entity import InputError, PairBatch, PromptBatch, box_prompts
from tl_entity.tasks.boxes import LABELS, BoxPrompt, sample_prompts
from tl_entity.tasks.desiderata import (
    DESIDERATA,
    Desideratum,
    Form,
    desideratum_draws,
    desideratum_pairs,
    sample_desideratum_pairs,
    write_prompt,
)
from tl_entity.tasks.nouns import OBJECTS
from tl_entity.training.tokenizer import build_tokenizer

FORM = ["The", "the", "is", "in", "Box", "contains", ",", "."]
NOUNS = frozenset(OBJECTS)
ALTERED = ["was", "and", "not", "next", "to"]
TOKENIZERS = {
    "word": word_tokenizer([*FORM, *ALTERED, *OBJECTS, *LABELS]),
    "default pair": build_tokenizer(),
}
BOTH = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
EACH = pytest.mark.parametrize("name", DESIDERATA)


class Statement(NamedTuple):
    """An object said to be in a box, or not to be, and where the two words stand."""

    noun: str
    label: str
    noun_at: int
    label_at: int
    denied: bool


class Reading(NamedTuple):
    statements: list[Statement]
    asked: str
    asked_at: int

    @property
    def index(self) -> int:
        (index,) = [i for i, said in enumerate(self.statements) if said.label == self.asked]
        return index


def read(words: list[str]) -> Reading:
    """Go from `Box` to `Box` and see what is said of each."""
    statements = []
    for i, word in enumerate(words):
        if word != "Box":
            continue
        label_at = i + 1
        following = words[i + 2 : i + 4]
        if following == ["contains", "the"] and i + 4 == len(words):
            return Reading(statements, words[label_at], label_at)
        if following == ["contains", "the"]:
            noun_at, denied = i + 4, False
        elif words[i - 1] == "in":
            noun_at = max(at for at in range(i) if words[at] in NOUNS)
            denied = "not" in words[noun_at:i]
        else:
            continue
        statements.append(
            Statement(words[noun_at], words[label_at], noun_at, label_at, denied=denied)
        )
    raise AssertionError(f"no question in {words}")


def words_of(batch: PromptBatch, tokenizer: object) -> list[list[str]]:
    return [
        tokenizer.convert_ids_to_tokens(tokens[mask].tolist())
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True)
    ]


def readings(pairs: PairBatch, tokenizer: object) -> list[tuple[Reading, Reading, str]]:
    targets = tokenizer.convert_ids_to_tokens(pairs.targets.tolist())
    sides = [words_of(batch, tokenizer) for batch in (pairs.clean, pairs.corrupt)]
    return [
        (read(base), read(counterfactual), target)
        for base, counterfactual, target in zip(*sides, targets, strict=True)
    ]


@BOTH
@EACH
def test_targets_are_what_a_reader_finds(name: str, tokenizer: object) -> None:
    n_boxes = 5
    pairs = desideratum_pairs(tokenizer, name, 20, n_boxes=n_boxes, seed=1)
    for base, counterfactual, target in readings(pairs, tokenizer):
        nouns = [said.noun for said in base.statements]
        assert len(base.statements) == n_boxes
        said = counterfactual.statements
        if name == "segment_before":
            said = said[1:]
        if name == "segment_after":
            said = said[:-1]
        assert len(said) == n_boxes
        index = Reading(said, counterfactual.asked, 0).index
        assert index != base.index
        if name == "object_value":
            assert target == said[index].noun
        elif name == "box_label_value":
            (box,) = [i for i, s in enumerate(base.statements) if s.label == counterfactual.asked]
            assert target == nouns[box]
            assert box not in (base.index, index)
        elif name == "next_position":
            assert target == nouns[(index + 1) % n_boxes]
        else:
            assert target == nouns[index]
        assert target != nouns[base.index]


@BOTH
@EACH
def test_positions_and_answers_are_each_prompts_own(name: str, tokenizer: object) -> None:
    pairs = desideratum_pairs(tokenizer, name, 10, seed=2)
    both = readings(pairs, tokenizer)
    for side, batch in ((0, pairs.clean), (1, pairs.corrupt)):
        answers = batch.answers.tolist()
        for row, words in enumerate(words_of(batch, tokenizer)):
            reading = both[row][side]
            said = reading.statements[reading.index]
            at = {name: int(indices[row]) for name, indices in batch.positions.items()}
            assert at == {
                "last": len(words) - 1,
                "query_label": reading.asked_at,
                "previous_query_label": said.label_at,
                "correct_object": said.noun_at,
            }
            assert said.denied == (side == 1 and name == "is_not_in")
            answer = -1 if said.denied else tokenizer.convert_tokens_to_ids(said.noun)
            assert answers[row] == answer


@EACH
def test_the_prompts_of_a_pair_share_words_only_where_they_should(name: str) -> None:
    tokenizer = TOKENIZERS["word"]
    pairs = desideratum_pairs(tokenizer, name, 10, seed=3)
    content = {*OBJECTS, *LABELS}
    sides = [words_of(batch, tokenizer) for batch in (pairs.clean, pairs.corrupt)]
    for base, counterfactual in zip(*sides, strict=True):
        shared = set(base) & set(counterfactual) & content
        assert shared == ({read(counterfactual).asked} if name == "box_label_value" else set())
        for words in (base, counterfactual):
            reading = read(words)
            assert len({said.noun for said in reading.statements}) == len(reading.statements)
            assert len({said.label for said in reading.statements}) == len(reading.statements)
            # The asked label stands once in the context and once in the question.
            assert words.count(reading.asked) == 2


@EACH
def test_every_other_segment_is_asked_about(name: str) -> None:
    tokenizer = TOKENIZERS["word"]
    pairs = desideratum_pairs(tokenizer, name, 120, n_boxes=3, seed=0)
    asked = {
        (base.index, counterfactual.index - (name == "segment_before"))
        for base, counterfactual, _ in readings(pairs, tokenizer)
    }
    # The control leaves out the pairs whose target would be the base prompt's own answer.
    never = {(i, i) for i in range(3)}
    if name == "next_position":
        never |= {(i, (i - 1) % 3) for i in range(3)}
    assert asked == {(i, j) for i in range(3) for j in range(3)} - never


EXPECTED = {
    "object_value": "The cup is in Box A, the key is in Box B. Box B contains the",
    "box_label_value": "The cup is in Box A, the key is in Box B. Box B contains the",
    "position": "The cup is in Box A, the key is in Box B. Box B contains the",
    "text_before": "The pen is next to the hat. The cup is in Box A, the key is in Box B. "
    "Box B contains the",
    "text_after": "The cup is in Box A, the key is in Box B. The pen is next to the hat. "
    "Box B contains the",
    "segment_before": "The pen is in Box X, the cup is in Box A, the key is in Box B. "
    "Box B contains the",
    "segment_after": "The cup is in Box A, the key is in Box B, the pen is in Box X. "
    "Box B contains the",
    "box_statement": "The cup is in Box A, Box X is next to Box Y, the key is in Box B. "
    "Box B contains the",
    "extra_tokens": "The cup is in Box A, the key was and is in Box B. Box B contains the",
    "comma_after_object": "The cup, is in Box A, the key, is in Box B. Box B contains the",
    "no_commas": "The cup is in Box A the key is in Box B. Box B contains the",
    "is_not_in": "The cup is in Box A, the key is not in Box B. Box B contains the",
    "label_first": "The cup is in Box A, Box B contains the key. Box B contains the",
    "next_position": "The cup is in Box A, the key is in Box B. Box B contains the",
}


@EACH
def test_texts_are_written_as_described(name: str) -> None:
    prompt = BoxPrompt(("cup", "key"), ("A", "B"), "B")
    extra = {"object_1": "pen", "object_2": "hat", "label_1": "X", "label_2": "Y"}
    kind = DESIDERATA[name]
    assert write_prompt(prompt, kind.counterfactual, extra).text == EXPECTED[name]
    assert write_prompt(prompt, kind.base, extra).text == prompt.text
    assert kind.name == name
    assert kind.says.endswith(".")


def test_base_prompts_are_the_tasks_own() -> None:
    tokenizer = TOKENIZERS["word"]
    prompts = box_prompts(tokenizer, 10, seed=5)
    for name in DESIDERATA:
        pairs = desideratum_pairs(tokenizer, name, 10, seed=5)
        assert torch.equal(pairs.clean.tokens, prompts.tokens)
        assert torch.equal(pairs.clean.answers, prompts.answers)
        for position, indices in prompts.positions.items():
            assert torch.equal(pairs.clean.positions[position], indices)


def test_forms_differ_in_nothing_but_the_form() -> None:
    def sample(name: str) -> list:
        return sample_desideratum_pairs(
            name, 10, seed=4, objects=tuple(OBJECTS), labels=tuple(LABELS)
        )

    plain = sample("position")
    for name in ("text_before", "no_commas", "label_first"):
        for pair, other in zip(plain, sample(name), strict=True):
            assert (pair.base, pair.target) == (other.base, other.target)
            assert read_text(pair.counterfactual.text) == read_text(other.counterfactual.text)
    assert plain == sample("position")
    seed_5 = sample_desideratum_pairs(
        "position", 10, seed=5, objects=tuple(OBJECTS), labels=tuple(LABELS)
    )
    assert plain != seed_5


def read_text(text: str) -> tuple[list[tuple[str, str]], str]:
    spaced = text.replace(",", " ,").replace(".", " .").split()
    reading = read(spaced)
    return [(said.noun, said.label) for said in reading.statements], reading.asked


@pytest.mark.parametrize(
    ("name", "n_objects", "n_labels"),
    [("text_before", 8, 6), ("segment_before", 7, 7), ("box_statement", 6, 8)],
)
def test_extra_words_are_new_to_the_pair(name: str, n_objects: int, n_labels: int) -> None:
    # No more words than a pair needs: a clash of any two could not be missed.
    pairs = sample_desideratum_pairs(
        name, 10, n_boxes=3, seed=0, objects=OBJECTS[:n_objects], labels=LABELS[:n_labels]
    )
    for pair in pairs:
        words = f"{pair.base.text} {pair.counterfactual.text}".replace(",", "").replace(".", "")
        nouns = [word for word in words.split() if word in NOUNS]
        assert len(nouns) == len(set(nouns)) == n_objects
        assert len({word for word in words.split() if word in LABELS}) == n_labels


def test_draws_are_the_pairs_of_a_seed() -> None:
    tokenizer = TOKENIZERS["word"]
    draws = desideratum_draws(tokenizer, ["position", DESIDERATA["no_commas"]], 4, n_boxes=3)
    assert list(draws) == ["position", "no_commas"]
    for name, draw in draws.items():
        expected = desideratum_pairs(tokenizer, name, 4, n_boxes=3, seed=8)
        assert torch.equal(draw(8).corrupt.tokens, expected.corrupt.tokens)
        assert torch.equal(draw(8).targets, expected.targets)


def test_one_can_describe_ones_own() -> None:
    tokenizer = TOKENIZERS["word"]
    mine = Desideratum(
        "two_on", "Position, two segments on.", counterfactual=Form(between=". "), target_shift=2
    )
    pairs = desideratum_pairs(tokenizer, mine, 20, n_boxes=5, seed=0)
    for base, counterfactual, target in readings(pairs, tokenizer):
        assert target == base.statements[(counterfactual.index + 2) % 5].noun


def test_words_without_a_token_are_named() -> None:
    plain = word_tokenizer([*FORM, *OBJECTS, *LABELS])
    assert len(desideratum_pairs(plain, "no_commas", 3, seed=0)) == 3
    with pytest.raises(InputError, match=r"no token for 'next', 'to', .*'text_before'"):
        desideratum_pairs(plain, "text_before", 3, seed=0)
    with pytest.raises(InputError, match=r"no token for 'and', 'was', .*'extra_tokens'"):
        desideratum_pairs(plain, "extra_tokens", 3, seed=0)


def test_impossible_pairs_are_refused() -> None:
    tokenizer = TOKENIZERS["word"]
    with pytest.raises(InputError, match="no desideratum 'positional'; there are object_value, "):
        desideratum_pairs(tokenizer, "positional", 1, seed=0)
    with pytest.raises(InputError, match="'position' needs at least 2 boxes"):
        desideratum_pairs(tokenizer, "position", 1, n_boxes=1, seed=0)
    for name in ("box_label_value", "next_position"):
        with pytest.raises(InputError, match=f"'{name}' needs at least 3 boxes"):
            desideratum_pairs(tokenizer, name, 1, n_boxes=2, seed=0)
    assert len(desideratum_pairs(tokenizer, "position", 1, n_boxes=13, seed=0)) == 1
    with pytest.raises(InputError, match="13 boxes for 'segment_after' need 27 labels"):
        desideratum_pairs(tokenizer, "segment_after", 1, n_boxes=13, seed=0)
    with pytest.raises(InputError, match="need 28 labels"):
        desideratum_pairs(tokenizer, "box_statement", 1, n_boxes=13, seed=0)
    (prompt,) = sample_prompts(1, seed=0)
    with pytest.raises(InputError, match=r"no word for the slot \{object_1\}"):
        write_prompt(prompt, DESIDERATA["text_before"].counterfactual)
    with pytest.raises(InputError, match="No box is labelled 'Z'"):
        write_prompt(BoxPrompt(("cup",), ("A",), "Z"))
