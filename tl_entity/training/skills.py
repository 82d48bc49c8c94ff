"""The texts that a real model is fine-tuned on: variable look-up, arithmetic, plain stories.

Nothing in them is about boxes, and none of the box task's objects occurs, so that whatever a
fine-tune gains on boxes is not the box task learned.
"""

import random
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.encode import encode
from tl_entity.training.texts import IGNORED, Piece

N_VARIABLES = (3, 8)
"""Fewest and most variables in a look-up text."""

N_QUESTIONS = 3
"""Most questions in a look-up text; also the number of problems in an arithmetic text."""

COLOURS = tuple(
    "red blue green black white brown pink grey purple yellow gold silver violet crimson".split()
)
ANIMALS = tuple("cat dog horse sheep goat wolf bear lion tiger eagle owl crow fish frog".split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = tuple(str(number) for number in range(100))


class Form(NamedTuple):
    """One way to write variables and a question about one, with `{name}` and `{value}`.

    Attributes:
        definition: of one variable.
        separator: between two definitions.
        end: after the last definition, before the first question.
        question: up to the value.
        closing: after the value, before another question.
    """

    definition: str
    separator: str
    end: str
    question: str
    closing: str


FORMS: Mapping[str, Form] = {
    "statement": Form("{name} = {value}", "; ", ". ", "{name} = ", "; "),
    "arrow": Form("{name} -> {value}", ", ", ". ", "{name} -> ", ", "),
    "command": Form("set {name} {value}", "; ", ". ", "get {name}: ", "; "),
    "program": Form("{name} = '{value}'", "\n", "\n", "assert {name} == '", "'\n"),
    "mapping": Form("'{name}': '{value}'", ", ", ". ", "'{name}': '", "', "),
}
"""The forms of a look-up text, by name."""


class Operation(NamedTuple):
    """An operation of arithmetic.

    Attributes:
        phrasings: problems with `{a}` and `{b}`; the result follows after a space.
        digits: most digits of the two numbers.
        result: what follows, or None where the problem is not to be asked.
    """

    phrasings: tuple[str, ...]
    digits: tuple[int, int]
    result: Callable[[int, int], str | None]


def _quotient(a: int, b: int) -> str | None:
    if b == 0:
        return None
    whole, rest = divmod(a, b)
    return f"{whole} R {rest}" if rest else str(whole)


OPERATIONS: Mapping[str, Operation] = {
    "addition": Operation(
        ("{a} + {b} =", "{a} plus {b} equals", "Add {a} and {b}:", "What is {a} + {b}? Answer:"),
        (4, 4),
        lambda a, b: str(a + b),
    ),
    "subtraction": Operation(
        ("{a} - {b} =", "{a} minus {b} equals", "Take {b} from {a}:", "What is {a} - {b}? Answer:"),
        (4, 4),
        lambda a, b: str(a - b) if a >= b else None,
    ),
    "multiplication": Operation(
        (
            "{a} * {b} =",
            "{a} times {b} equals",
            "Multiply {a} by {b}:",
            "What is {a} * {b}? Answer:",
        ),
        (3, 1),
        lambda a, b: str(a * b),
    ),
    "division": Operation(
        (
            "{a} / {b} =",
            "{a} divided by {b} equals",
            "Divide {a} by {b}:",
            "What is {a} / {b}? Answer:",
        ),
        (3, 1),
        _quotient,
    ),
}
"""What arithmetic texts ask, by name. A division that leaves a rest answers `3 R 2`."""

_PEOPLE = ("Mara", "Tom", "Ines", "Paul", "Nora", "Felix", "Anna", "Oskar", "Lena", "Hugo")
_TIMES = (
    "Early in the morning",
    "Late one evening",
    "On a warm afternoon",
    "After a long winter",
    "One rainy day",
    "Before the sun was up",
)
_MOVES = ("walked", "went", "rode", "ran", "drove", "hurried")
_PLACES = ("river", "harbour", "market", "village", "forest", "station", "school", "valley")
_SIGHTS = (
    "The wind was cold and the street was quiet",
    "Nobody else was out, and it was still dark",
    "Children were laughing somewhere behind the houses",
    "It smelled of rain and wet grass",
    "A long line of people waited and talked",
    "The hills were covered with fog",
)
_FEELINGS = ("felt tired", "was glad", "began to sing", "laughed", "said nothing", "was worried")
_ENDINGS = (
    "It had been a good day",
    "Soon it was time to go home",
    "Then everybody sat down and ate together",
    "Tomorrow would be different",
    "And so the week came to an end",
    "Nothing more happened that night",
)


def lookup(generator: random.Random) -> list[Piece]:
    """Variables and one to three questions, in one of `FORMS`: `a = red; b = blue. a = red`.

    No variable is asked about twice, and no two have the same value. Only the values asked for are
    learned: names and values are random, and to predict them would teach nothing but habits.
    """
    form = FORMS[generator.choice(list(FORMS))]
    values = generator.choice((COLOURS, ANIMALS, DAYS, NUMBERS))
    n_variables = generator.randint(N_VARIABLES[0], min(N_VARIABLES[1], len(values)))
    names = generator.sample(string.ascii_lowercase, n_variables)
    table = dict(zip(names, generator.sample(values, n_variables), strict=True))
    definitions = [form.definition.format(name=name, value=table[name]) for name in names]
    before = form.separator.join(definitions) + form.end
    pieces = []
    for name in generator.sample(names, generator.randint(1, N_QUESTIONS)):
        pieces += [
            Piece(before + form.question.format(name=name), False),
            Piece(table[name], True),
        ]
        before = form.closing
    return pieces


def arithmetic(generator: random.Random) -> list[Piece]:
    """Three problems, one a line, each of a random operation and phrasing; the results are learned.

    The numbers of digits are drawn first, so that short numbers are as frequent as long ones.
    """
    pieces = []
    for line in range(N_QUESTIONS):
        problem, result = _problem(generator)
        before = "\n" if line else ""
        pieces += [Piece(f"{before}{problem} ", False), Piece(result, True)]
    return pieces


def story(generator: random.Random) -> list[Piece]:
    """Four plain sentences in which nothing has to be looked up; every word is learned."""
    person = generator.choice(_PEOPLE)
    sentences = (
        f"{generator.choice(_TIMES)} {person} {generator.choice(_MOVES)} to the "
        f"{generator.choice(_PLACES)}.",
        f"{generator.choice(_SIGHTS)}.",
        f"{person} {generator.choice(_FEELINGS)}.",
        f"{generator.choice(_ENDINGS)}.",
    )
    return [Piece(" ".join(sentences), True)]


SKILLS: Mapping[str, Callable[[random.Random], list[Piece]]] = {
    "lookup": lookup,
    "arithmetic": arithmetic,
    "stories": story,
}
"""The kinds of text, by the name that a mix gives shares to. Pieces join without a space."""


def choose_kinds(mix: Mapping[str, float], n_texts: int, generator: random.Random) -> list[str]:
    """The kind of each of `n_texts` texts: each as often as its share says, up to rounding.

    Points at equal distances, the first one random, are laid over the shares: no run of one kind by
    chance, and over many draws every kind has exactly its share.
    """
    total = sum(mix.values())
    first = generator.random()
    points = [total * (i + first) / n_texts for i in range(n_texts)]
    kinds, bound = [], 0.0
    remaining = iter(mix.items())
    kind, share = next(remaining)
    for point in points:
        while point >= bound + share:
            following = next(remaining, None)
            if following is None:  # only rounding can lead past the last bound
                break
            bound += share
            kind, share = following
        kinds.append(kind)
    return kinds


@checked
def skill_batch(
    tokenizer: PreTrainedTokenizerBase, kinds: list[str], generator: random.Random
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """One text of each kind named, a row each, padded on the right.

    A token is learned when a character of a learned piece is in it, whatever the tokenizer.

    Returns:
        The tokens, with the special tokens that `encode` puts, and what is to be
        predicted at each: the next token, or `IGNORED`.

    Raises:
        InputError: if the tokenizer can't tell which characters a token covers, or has no token
            for a word that is to be learned.
    """
    texts = [SKILLS[kind](generator) for kind in kinds]
    encoded = encode(tokenizer, ["".join(piece.words for piece in pieces) for pieces in texts])
    width = max(len(text.ids) for text in encoded)
    padding = tokenizer.pad_token_id
    tokens = torch.full((len(kinds), width), padding if isinstance(padding, int) else 0)
    targets = torch.full((len(kinds), width), IGNORED)
    for row, (pieces, text) in enumerate(zip(texts, encoded, strict=True)):
        ids, offsets = text.ids, text.offsets
        tokens[row, : len(ids)] = torch.tensor(ids)
        learned = _learned_characters(pieces)
        for place in range(1, len(ids)):
            if any(learned[slice(*offsets[place])]):
                if ids[place] == tokenizer.unk_token_id:
                    words = "".join(piece.words for piece in pieces)
                    unknown = words[slice(*offsets[place])]
                    raise InputError(
                        f"The tokenizer has no token for {unknown!r}, which texts of the kind "
                        f"{kinds[row]!r} teach; this model can't be trained on them."
                    )
                targets[row, place - 1] = ids[place]
    return tokens, targets


def _problem(generator: random.Random) -> tuple[str, str]:
    """A problem in words or signs, and its result."""
    operation = OPERATIONS[generator.choice(list(OPERATIONS))]
    while True:
        a, b = (
            generator.randrange(10 ** generator.randint(1, digits)) for digits in operation.digits
        )
        result = operation.result(a, b)
        if result is not None:
            return generator.choice(operation.phrasings).format(a=a, b=b), result


def _learned_characters(pieces: list[Piece]) -> list[bool]:
    return [piece.is_learned for piece in pieces for _ in piece.words]
