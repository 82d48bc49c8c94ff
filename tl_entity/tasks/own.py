"""A task of one's own: prompts as plain texts with marks, read into what every method works on.

A mark is written `[[name|word]]` and gives the word's token a name:

    "When [[first|Mary]] and [[second|John]] went to the store, [[repeated|John]] gave a drink to"

The marks are taken out, the text is tokenized by the model's own tokenizer, and each name becomes a
named position; `"last"`, where the answer is read, is always the final token and needs no mark. All
prompts of a batch have the same names, and a marked word must be one token. Texts in which many
words vary are made by Python's own `str.format`, which leaves the marks alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch
from tl_entity.tasks.marked import MarkedText, Span, tokenize_marked

_MARK = re.compile(r"\[\[([^\[\]|]+)\|([^\[\]|]+)\]\]")


@checked
def read_marks(text: str, answer: str | None = None) -> MarkedText:
    """A text without its marks, and the characters that each name covers.

    >>> read_marks("When [[first|Mary]] and [[second|John]] left,").spans
    {'first': (5, 9), 'second': (14, 18)}

    Args:
        text: the prompt, with any number of marks `[[name|word]]`.
        answer: the word that should follow after a space.

    Raises:
        InputError: if a name comes twice or is `last`, a marked word has a space at an end, the
            text ends with a space, or brackets are left that are no mark.
    """
    plain, end = "", 0
    spans: dict[str, Span] = {}
    for mark in _MARK.finditer(text):
        plain += text[end : mark.start()]
        name, word = mark[1].strip(), mark[2]
        if word != word.strip():
            raise InputError(f"Mark the word alone, without spaces: {mark[0]!r} in {text!r}.")
        if name == ANSWER_POSITION:
            raise InputError(f"{name!r} is always the final token; name {mark[0]!r} otherwise.")
        if name in spans:
            raise InputError(f"The name {name!r} is given twice in {text!r}.")
        spans[name] = (len(plain), len(plain) + len(word))
        plain += word
        end = mark.end()
    plain += text[end:]
    if "[[" in plain or "]]" in plain:
        raise InputError(f"A mark is written [[name|word]]; {text!r} has brackets of another form.")
    if plain != plain.rstrip():
        raise InputError(f"{text!r} ends with a space; the answer is put after one by itself.")
    # By name, so that prompts may have their marks in different orders.
    return MarkedText(plain, dict(sorted(spans.items())), answer)


@checked
def marked_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    answers: Sequence[str | None] | None = None,
) -> PromptBatch:
    """Prompts of one's own as tokens with named positions.

    Args:
        tokenizer: the model's.
        texts: the prompts, with marks `[[name|word]]`.
        answers: the word that should follow each, after a space; None where there is no right one.

    Raises:
        InputError: as `read_marks` and `tokenize_marked`, and if texts and answers are not equally
            many.
    """
    answers = [None] * len(texts) if answers is None else answers
    _check_counts(texts=texts, answers=answers)
    return tokenize_marked(
        [read_marks(text, answer) for text, answer in zip(texts, answers, strict=True)], tokenizer
    )


@checked
def marked_pairs(
    tokenizer: PreTrainedTokenizerBase,
    clean: Sequence[str],
    corrupt: Sequence[str],
    *,
    answers: Sequence[str],
    targets: Sequence[str] | None = None,
    foils: Sequence[str] | None = None,
) -> PairBatch:
    """Pairs of clean and corrupt prompts of one's own.

    Args:
        tokenizer: the model's.
        clean: the prompts that are run and edited, with marks `[[name|word]]`.
        corrupt: the prompts that edits come from, with marks of the same names; a pair's two texts
            may differ in length.
        answers: the right word after each clean prompt.
        targets: the word scored on the clean run; the answers if left out. DCM and activation
            patching score what the corrupt prompt would bring.
        foils: the wrong word that a logit difference compares the target with
            (`tl_entity.metrics.LOGIT_DIFFERENCE`).

    Raises:
        InputError: as `read_marks` and `tokenize_marked`; if the lists are not equally long, or
            clean and corrupt prompts name different positions.
    """
    targets = answers if targets is None else targets
    _check_counts(
        **{"clean prompts": clean, "corrupt prompts": corrupt, "answers": answers},
        **{"targets": targets} | ({} if foils is None else {"foils": foils}),
    )
    texts = [read_marks(text, answer) for text, answer in zip(clean, answers, strict=True)]
    others = [read_marks(text) for text in corrupt]
    if texts and others and set(texts[0].spans) != set(others[0].spans):
        raise InputError(
            f"The clean prompts name {_names(texts[0])}, the corrupt ones {_names(others[0])}; "
            "both of a pair must name the same positions."
        )
    batch = tokenize_marked(texts, tokenizer)
    return PairBatch(
        clean=batch,
        corrupt=tokenize_marked(others, tokenizer),
        targets=batch.answers if targets is answers else _words(texts, targets, tokenizer),
        foils=None if foils is None else _words(texts, foils, tokenizer),
    )


@checked
def dataset_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    text: str = "text",
    answer: str = "answer",
) -> PromptBatch:
    """`marked_prompts` of a `datasets.Dataset`, or of any rows with columns.

    Args:
        tokenizer: the model's.
        rows: one row a prompt.
        text: name of the column with the texts, which have marks `[[name|word]]`.
        answer: name of the column with the answers; prompts have none if there is no such
            column.

    Raises:
        InputError: naming the row and column where a text is missing; as `marked_prompts`.
    """
    rows = list(rows)
    answers = _column(rows, answer) if _is_column(rows, answer) else None
    return marked_prompts(tokenizer, _column(rows, text), answers)


@checked
def dataset_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    clean: str = "clean",
    corrupt: str = "corrupt",
    answer: str = "answer",
    target: str = "target",
    foil: str = "foil",
) -> PairBatch:
    """`marked_pairs` of a `datasets.Dataset`, or of any rows with columns.

    Args:
        tokenizer: the model's.
        rows: one row a pair.
        clean: name of the column with the clean prompts, which have marks `[[name|word]]`.
        corrupt: name of the column with the corrupt prompts.
        answer: name of the column with the right words.
        target: name of the column with the words scored on the clean run; the answers if there is
            no such column.
        foil: name of the column with the wrong words; no foils if there is no such column.

    Raises:
        InputError: naming the row and column where a text is missing; as `marked_pairs`.
    """
    rows = list(rows)
    return marked_pairs(
        tokenizer,
        _column(rows, clean),
        _column(rows, corrupt),
        answers=_column(rows, answer),
        targets=_column(rows, target) if _is_column(rows, target) else None,
        foils=_column(rows, foil) if _is_column(rows, foil) else None,
    )


def _words(
    texts: Sequence[MarkedText], words: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Int[Tensor, " batch"]:
    """Token ids of other words than the answers, after the same texts."""
    after = [replace(text, answer=word) for text, word in zip(texts, words, strict=True)]
    return tokenize_marked(after, tokenizer).answers


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    for number, row in enumerate(rows):
        if not isinstance(row.get(name), str):
            raise InputError(
                f"Row {number} has no text in a column {name!r}; it has {', '.join(row)}."
            )
    return [row[name] for row in rows]


def _is_column(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in row for row in rows)


def _check_counts(**lists: Sequence[Any]) -> None:
    counts = {name: len(some) for name, some in lists.items()}
    if len(set(counts.values())) != 1:
        shown = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"{shown}: there must be as many of each.")


def _names(text: MarkedText) -> str:
    return ", ".join(text.spans) or "no position"
