"""The tasks that ship ask what they say, with any tokenizer, and name the words they leave out."""

import re
from collections.abc import Iterable

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.random_models import word_tokenizer
from tl_entity import TASKS, InputError, PairBatch, task_pairs, task_prompts, task_words
from tl_entity.tasks.shipped.capitals import TASK as CAPITALS

TEXT_WORDS = (
    "When After While Yesterday and had were to the The at a , gave handed passed brought went "
    "arrived waiting met near behind next in front of lasted from year capital is city Last we "
    "visited its government sits plus"
).split()
ALL_WORDS = {
    form for task in TASKS.values() for some in task.words.values() for w in some for form in w
}
NUMBERS = [f"{n:02}" for n in range(100)]
DIGITS = list("0123456789")


def split_tokenizer(pattern: str, words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each match of a pattern; spaces are no tokens."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_level_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Words with the space ahead of them are tokens, as are digits and the space ahead of them."""
    pieces = [piece for word in words for piece in (word, f"Ġ{word}")]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "Ġ", *dict.fromkeys(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KNOWN = [*TEXT_WORDS, *sorted(ALL_WORDS)]
TOKENIZERS = {
    "digits": split_tokenizer(r"\d|[a-zA-Z]+|,", [*KNOWN, *DIGITS]),
    "two digits": split_tokenizer(r"\d\d|[a-zA-Z]+|,", [*KNOWN, *NUMBERS]),
    "byte level": byte_level_tokenizer([*KNOWN, *DIGITS]),
}


def texts(pairs: PairBatch, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str, str, str]]:
    """Clean, corrupt, answer and foil, with one space between tokens and none inside numbers."""

    def text(ids: torch.Tensor) -> str:
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        spaced = " ".join(token.replace("Ġ", " ") for token in tokens)
        spaced = re.sub(r" +", " ", spaced).strip()
        return re.sub(r"(?<=\d) (?=\d)", "", spaced)

    return [
        (
            text(pairs.clean.tokens[i][pairs.clean.mask[i]]),
            text(pairs.corrupt.tokens[i][pairs.corrupt.mask[i]]),
            text(pairs.targets[i : i + 1]),
            text(pairs.foils[i : i + 1]),
        )
        for i in range(len(pairs))
    ]


def drawn(name: str, written: str, n: int = 60) -> list[tuple[str, str, str, str]]:
    tokenizer = TOKENIZERS[written]
    return texts(task_pairs(name, tokenizer, n, seed=3), tokenizer)


@pytest.mark.parametrize("written", TOKENIZERS)
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_drawn_by_its_seed(name, written) -> None:
    tokenizer = TOKENIZERS[written]
    pairs, again, other = (task_pairs(name, tokenizer, 30, seed) for seed in (0, 0, 1))
    assert pairs.same_as(again) and not pairs.same_as(other)
    assert task_pairs(name, tokenizer, 10, 0).same_as(pairs[:10])
    assert torch.equal(task_prompts(name, tokenizer, 30, 0).tokens, pairs.clean.tokens)
    unknown = tokenizer.unk_token_id
    for batch in (pairs.clean, pairs.corrupt):
        assert not (batch.tokens[batch.mask] == unknown).any()
        assert batch.roles is not None and torch.equal(batch.roles >= 0, batch.mask)
    assert pairs.foils is not None and not (pairs.foils == pairs.targets).any()
    assert torch.equal(pairs.targets, pairs.clean.answers)
    assert set(pairs.clean.role_names) == set(pairs.corrupt.role_names)
    assert not set(pairs.clean.role_names) & set(pairs.clean.knowing)


def test_the_indirect_object_is_the_name_that_is_not_repeated() -> None:
    names = {name for (name,) in TASKS["indirect_objects"].words["name"]}
    seconds = 0
    for clean, corrupt, answer, foil in drawn("indirect_objects", "byte level"):
        a, b, c = (word for word in clean.split() if word in names)
        assert c in (a, b) and {answer, foil} == {a, b} and foil == c
        x, y, z = (word for word in corrupt.split() if word in names)
        assert len({a, b, x, y, z}) == 5
        seconds += answer == b
    assert 15 < seconds < 45


def test_names_are_blind_to_the_answer_and_positions_know_it() -> None:
    pairs = task_pairs("indirect_objects", TOKENIZERS["digits"], 40, seed=0)
    rows = torch.arange(40)
    at = {name: pairs.clean.tokens[rows, index] for name, index in pairs.clean.positions.items()}
    assert torch.equal(at["indirect_object"], pairs.targets)
    assert torch.equal(at["subject"], pairs.foils) and torch.equal(at["repeated"], pairs.foils)
    assert 5 < int((at["first"] == pairs.targets).sum()) < 35
    assert pairs.clean.knowing == ("indirect_object", "subject")
    for name in ("first", "second", "indirect_object", "subject"):
        assert torch.equal(
            pairs.corrupt.tokens[rows, pairs.corrupt.position(name)] == at[name],
            torch.zeros(40, dtype=torch.bool),
        )


def test_the_verb_agrees_with_the_subject() -> None:
    numbers = set()
    for clean, corrupt, answer, foil in drawn("agreement", "digits"):
        subject, attractor = clean.split()[1], clean.split()[-1]
        assert answer == ("are" if subject.endswith("s") else "is")
        assert foil == {"is": "are", "are": "is"}[answer]
        other = corrupt.split()
        assert other[-1] == attractor and other[2:] == clean.split()[2:]
        assert other[1].removesuffix("s").removesuffix("e") == subject.removesuffix(
            "s"
        ).removesuffix("e")
        assert other[1].endswith("s") != subject.endswith("s")
        numbers.add((answer, attractor.endswith("s")))
    assert len(numbers) == 4


def test_capitals_are_those_of_the_countries() -> None:
    capital_of = dict(CAPITALS.words["country"])
    for clean, corrupt, answer, foil in drawn("capitals", "byte level"):
        (country,) = set(clean.split()) & set(capital_of)
        (other,) = set(corrupt.split()) & set(capital_of)
        assert (capital_of[country], capital_of[other]) == (answer, foil) and country != other
        assert clean.replace(country, other) == corrupt


@pytest.mark.parametrize("written", TOKENIZERS)
def test_years_end_after_they_begin(written) -> None:
    for clean, corrupt, answer, foil in drawn("years", written):
        start, century = re.findall(r"\d+", clean)
        assert len(start) == 4 and start[:2] == century
        assert re.findall(r"\d+", corrupt) == [f"{century}01", century]
        began = int(start[2:])
        if written == "two digits":
            assert int(answer) > began > int(foil)
            assert int(answer) - began == began - int(foil)
        else:
            assert int(answer) > began // 10 > int(foil)
            assert int(answer) - began // 10 == began // 10 - int(foil)


@pytest.mark.parametrize("written", TOKENIZERS)
def test_sums_are_right(written) -> None:
    carried = set()
    for clean, corrupt, answer, foil in drawn("addition", written):
        for said in re.finditer(r"(\d+) plus (\d+) is (\d+)", clean):
            a, b, total = map(int, said.groups())
            assert a + b == total
        sums = []
        for text in (clean, corrupt):
            a, b = map(int, re.search(r"(\d\d) plus (\d\d) is$", text).groups())
            sums.append(str(a + b))
            assert len(sums[-1]) == 2
        carried.add(int(a) % 10 + int(b) % 10 > 9)
        n_digits = 2 if written == "two digits" else 1
        assert [total[:n_digits] for total in sums] == [answer, foil] and sums[0][0] != sums[1][0]
    assert carried == {True, False}


def test_words_that_are_not_one_token_are_left_out_by_name() -> None:
    small = [word for word in KNOWN if word not in ("Mary", "boxes", "Paris")]
    tokenizer = word_tokenizer(small)
    names = task_words("indirect_objects", tokenizer)
    assert names.left_out == {"name": [("Mary",)], "place": [], "thing": []}
    assert "name: 39 of 40 words used, not Mary" in str(names)
    assert task_words("agreement", tokenizer).left_out["noun"] == [("box", "boxes")]
    capitals = task_words("capitals", tokenizer)
    assert ("France", "Paris") not in capitals.used["country"]
    pairs = task_pairs("capitals", tokenizer, 300, seed=0)
    france = tokenizer.convert_tokens_to_ids("France")
    assert not (pairs.clean.tokens == france).any() and not (pairs.corrupt.tokens == france).any()


def test_what_a_tokenizer_can_not_be_asked_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"needs 5 words of the list 'name'.*writes 0.*not Mary, John"
    ):
        task_pairs("indirect_objects", word_tokenizer(TEXT_WORDS), 3)
    with pytest.raises(InputError, match=r"No task is called 'capital'.*did you mean 'capitals'"):
        task_pairs("capital", TOKENIZERS["digits"], 3)
    with pytest.raises(InputError, match="0 pairs of the task 'years': ask for at least one"):
        task_prompts("years", TOKENIZERS["digits"], 0)
    triples = split_tokenizer(r"\d{1,3}|[a-zA-Z]+|,", [*KNOWN, *map(str, range(1000))])
    with pytest.raises(InputError, match=r"cuts a year behind its century.*'the year 174 5'"):
        task_pairs("years", triples, 3)
    assert len(task_pairs("addition", triples, 3)) == 3


def test_tasks_say_what_they_are() -> None:
    assert list(TASKS) == ["indirect_objects", "agreement", "years", "capitals", "addition"]
    for name, task in TASKS.items():
        assert task.name == name and task.says.endswith("?") and task.source and task.example
