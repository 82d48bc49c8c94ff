"""The texts the default pair is trained on, each kind drawn from a seeded generator."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.tasks.boxes import LABELS, BoxPrompt
from tl_entity.tasks.nouns import OBJECTS
from tl_entity.training.tokenizer import LARGEST_NUMBER, VARIABLES

IGNORED = -100
"""Marks a token that no loss is taken of (PyTorch's default)."""

N_BOXES = (2, 8)
"""Fewest and most boxes in a text that is trained on."""


class Piece(NamedTuple):
    """Some words of a text, and whether the model learns to predict them."""

    words: str
    is_learned: bool


def box_sentence(generator: random.Random) -> list[Piece]:
    """Boxes and one question, every word learned."""
    return [Piece(_boxes(generator).sentence, True)]


def box_questions(generator: random.Random) -> list[Piece]:
    """Boxes and a question about each, in random order; only the answers are learned."""
    boxes = _boxes(generator)
    description, _ = boxes.text.split(". ")
    pieces = [Piece(f"{description}.", False)]
    for label, noun in _shuffled(generator, boxes.labels, boxes.objects):
        pieces += [
            Piece(f"Box {label} contains the", False),
            Piece(noun, True),
            Piece(".", False),
        ]
    return pieces


def lookup_questions(generator: random.Random) -> list[Piece]:
    """Four to ten variables and a question about each, `x = 3; y = 5; x -> 3;`, in random order;
    only the answers are learned.
    """
    names = generator.sample(VARIABLES, generator.randint(4, 10))
    values = [str(generator.randint(0, LARGEST_NUMBER)) for _ in names]
    table = "; ".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))
    pieces = [Piece(f"{table};", False)]
    for name, value in _shuffled(generator, names, values):
        pieces += [Piece(f"{name} ->", False), Piece(value, True), Piece(";", False)]
    return pieces


def arithmetic(generator: random.Random) -> list[Piece]:
    """Eight sums and differences of numbers below 50, `12 + 30 = 42;`; the results are learned."""
    pieces = []
    for _ in range(8):
        a, b = generator.randint(0, 49), generator.randint(0, 49)
        if generator.random() < 0.5:
            task, result = f"{a} + {b} =", a + b
        else:
            task, result = f"{max(a, b)} - {min(a, b)} =", abs(a - b)
        pieces += [Piece(task, False), Piece(str(result), True), Piece(";", False)]
    return pieces


def plain_statements(generator: random.Random) -> list[Piece]:
    """Five statements about where things are, no boxes, no questions; every word learned."""
    return [Piece(_statement(generator), True) for _ in range(5)]


KINDS: Mapping[str, Callable[[random.Random], list[Piece]]] = {
    "box sentence": box_sentence,
    "box questions": box_questions,
    "look-up": lookup_questions,
    "arithmetic": arithmetic,
    "plain": plain_statements,
}
"""The kinds of text, by the name a mixture gives shares to."""


@checked
def text_batch(
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mapping[str, float],
    n_texts: int,
    generator: random.Random,
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Texts of the kinds in `mixture` (name to share), one a row, padded on the right.

    Returns:
        The tokens, and what is to be predicted at each: the next token, or `IGNORED`.
    """
    kinds = generator.choices(list(mixture), list(mixture.values()), k=n_texts)
    rows = [_encode(tokenizer, KINDS[kind](generator)) for kind in kinds]
    width = max(len(tokens) for tokens, _ in rows)
    batch = torch.full((n_texts, width), _id(tokenizer.pad_token_id))
    targets = torch.full((n_texts, width), IGNORED)
    for row, (tokens, learned) in enumerate(rows):
        ids = torch.tensor(tokens)
        batch[row, : len(tokens)] = ids
        targets[row, : len(tokens) - 1] = torch.where(torch.tensor(learned), ids, IGNORED)[1:]
    return batch, targets


def _encode(
    tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]
) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it is learned."""
    tokens, learned = [_id(tokenizer.bos_token_id)], [False]
    encoded = tokenizer([piece.words for piece in pieces], add_special_tokens=False)["input_ids"]
    for piece, ids in zip(pieces, encoded, strict=True):
        tokens += ids
        learned += [piece.is_learned] * len(ids)
    return tokens, learned


def _id(token: object) -> int:
    """A special token's id, which transformers' types leave open."""
    assert isinstance(token, int)
    return token


def _boxes(generator: random.Random) -> BoxPrompt:
    n_boxes = generator.randint(*N_BOXES)
    labels = tuple(generator.sample(LABELS, n_boxes))
    objects = tuple(generator.sample(OBJECTS, n_boxes))
    return BoxPrompt(objects, labels, generator.choice(labels))


def _shuffled(generator: random.Random, *columns: Sequence[str]) -> list[tuple[str, ...]]:
    rows = list(zip(*columns, strict=True))
    return generator.sample(rows, len(rows))


def _statement(generator: random.Random) -> str:
    verb, place = generator.choice(("is", "was")), generator.choice(("on", "in", "under"))
    first, second, third, fourth = (generator.choice(OBJECTS) for _ in range(4))
    statement = f"The {first} {verb} {place} the {second}"
    if generator.random() < 0.4:
        statement += f", and the {third} {verb} next to the {fourth}"
    return f"{statement}."
