"""A task of one's own: prompts as plain texts with marks, read into what every method works on.

A mark is written `[[name|word]]` and gives the word's token a name:

    "When [[first|Mary]] and [[second|John]] went to the store, [[repeated|John]] gave a drink to"

The marks are taken out, the text is tokenized by the model's own tokenizer, and each name becomes a
named position; `"last"`, where the answer is read, is always the final token and needs no mark. All
prompts of a batch have the same names. Texts in which many words vary are made by Python's own
`str.format`, which leaves the marks alone.

A mark may cover several tokens, as `[[subject|very old keys]]`: then `subject` is a role and
`subject.first` and `subject.last` are positions. A name may come in several places, as that of all
names in a list. What stands between marks has roles of its own, such as `subject.after`, so that
prompts of different length are compared role by role.

A mark that depends on what is asked, such as that of the right name, is declared as `knowing`. It
gives positions but no role; it may stand inside a mark that does not know:

    "When [[name|[[right|Mary]]]] and [[name|[[wrong|John]]]] went to the store, ..."
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import ANSWER_POSITION, FIRST, LAST, PairBatch, PromptBatch
from tl_entity.tasks.marked import (
    AFTER,
    BEFORE,
    BEGINNING,
    UNMARKED,
    MarkedText,
    Span,
    tokenize_marked,
)

_PIECE = re.compile(r"\[\[([^\[\]|]+)\||\]\]")

_MADE = (FIRST, LAST, BEFORE, AFTER)
"""How names end that are made of a mark's."""


@checked
def read_marks(
    text: str, answer: str | None = None, *, knowing: Sequence[str] = (), space: bool = True
) -> MarkedText:
    """A text without its marks, and the characters that each name covers.

    >>> read_marks("When [[first|Mary]] and [[second|John]] left,").spans
    {'first': (5, 9), 'second': (14, 18)}

    Args:
        text: the prompt, with any number of marks `[[name|words]]`. In `spans` are those whose name
            comes once, in `marks` all of them.
        answer: the word that should follow.
        knowing: names of the marks that depend on what is asked.
        space: whether the answer follows after a space.

    Raises:
        InputError: if a name is `last` or ends as the names do that are made of marks, marked words
            have a space at an end, a mark stands inside another and neither knows the answer, the
            text ends with a space though one is put there, or brackets are left that are no mark.
    """
    plain, end = "", 0
    marks: list[tuple[str, Span]] = []
    open_marks: list[tuple[str, int]] = []
    for piece in _PIECE.finditer(text):
        plain += text[end : piece.start()]
        end = piece.end()
        if piece[1] is not None:
            open_marks.append((_mark_name(piece[1].strip(), text), len(plain)))
        elif open_marks:
            name, start = open_marks.pop()
            marks.append((name, (start, len(plain))))
        else:
            raise _other_form(text)
    plain += text[end:]
    if open_marks or "[[" in plain or "]]" in plain:
        raise _other_form(text)
    for name, span in marks:
        _check_words(name, plain[slice(*span)], text)
    marks.sort(key=lambda mark: (mark[1][0], -mark[1][1]))
    _check_nesting(marks, knowing, text)
    if space and plain != plain.rstrip():
        raise InputError(f"{text!r} ends with a space; the answer is put after one by itself.")
    count = Counter(name for name, _ in marks)
    # By name, so that prompts may have their marks in different orders.
    spans = {name: span for name, span in sorted(marks) if count[name] == 1}
    return MarkedText(plain, spans, answer, (), tuple(knowing), marks, space)


@checked
def marked_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    answers: str | Sequence[str | None] | None = None,
    *,
    knowing: str | Sequence[str] = (),
    space: bool = True,
) -> PromptBatch:
    """Prompts of one's own as tokens with named positions and roles.

    Args:
        tokenizer: the model's.
        texts: the prompts, with marks `[[name|words]]`; or one prompt.
        answers: the word that should follow each, after a space; None where there is no right one.
        knowing: names of the marks that depend on what is asked, such as that of the right word.
        space: whether a space stands between text and answer; without, the text may end with one.

    Raises:
        InputError: as `read_marks` and `tokenize_marked`; if texts and answers are not equally
            many, or no text has a mark that is said to know.
    """
    texts = _listed(texts)
    answers = [None] * len(texts) if answers is None else _listed(answers)
    _check_counts(texts=texts, answers=answers)
    how: dict[str, Any] = {"knowing": _listed(knowing), "space": space}
    marked = [read_marks(text, word, **how) for text, word in zip(texts, answers, strict=True)]
    _check_knowing(marked)
    return tokenize_marked(marked, tokenizer)


@checked
def marked_pairs(
    tokenizer: PreTrainedTokenizerBase,
    clean: str | Sequence[str],
    corrupt: str | Sequence[str],
    *,
    answers: str | Sequence[str],
    targets: str | Sequence[str] | None = None,
    foils: str | Sequence[str] | None = None,
    knowing: str | Sequence[str] = (),
    space: bool = True,
) -> PairBatch:
    """Pairs of clean and corrupt prompts of one's own.

    Args:
        tokenizer: the model's.
        clean: the prompts that are run and edited, with marks `[[name|words]]`.
        corrupt: the prompts that edits come from, with marks of the same names; a pair's two texts
            may differ in length.
        answers: the right word after each clean prompt.
        targets: the word scored on the clean run; the answers if left out. DCM and activation
            patching score what the corrupt prompt would bring.
        foils: the wrong word that a logit difference compares the target with
            (`tl_entity.metrics.LOGIT_DIFFERENCE`).
        knowing: names of the marks that depend on what is asked, such as that of the right word.
        space: whether a space stands between text and answer; without, the text may end with one.

    Raises:
        InputError: as `read_marks` and `tokenize_marked`; if the lists are not equally long, clean
            and corrupt prompts name different positions, or no text has a mark that is said to
            know.
    """
    clean, corrupt, answers = _listed(clean), _listed(corrupt), _listed(answers)
    targets = answers if targets is None else _listed(targets)
    foils = None if foils is None else _listed(foils)
    _check_counts(
        **{"clean prompts": clean, "corrupt prompts": corrupt, "answers": answers},
        **{"targets": targets} | ({} if foils is None else {"foils": foils}),
    )
    how: dict[str, Any] = {"knowing": _listed(knowing), "space": space}
    texts = [read_marks(text, word, **how) for text, word in zip(clean, answers, strict=True)]
    others = [read_marks(text, **how) for text in corrupt]
    if texts and others and texts[0].names != others[0].names:
        raise InputError(
            f"The clean prompts name {_names(texts[0])}, the corrupt ones {_names(others[0])}; "
            "both of a pair must name the same positions."
        )
    _check_knowing(texts)
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
    knowing: str | Sequence[str] = (),
    space: bool = True,
) -> PromptBatch:
    """`marked_prompts` of a `datasets.Dataset`, or of any rows with columns.

    Args:
        tokenizer: the model's.
        rows: one row a prompt.
        text: name of the column with the texts, which have marks `[[name|word]]`.
        answer: name of the column with the answers; prompts have none if there is no such
            column.
        knowing: as in `marked_prompts`.
        space: as in `marked_prompts`.

    Raises:
        InputError: naming the row and column where a text is missing; as `marked_prompts`.
    """
    rows = list(rows)
    answers = _column(rows, answer) if _is_column(rows, answer) else None
    return marked_prompts(tokenizer, _column(rows, text), answers, knowing=knowing, space=space)


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
    knowing: str | Sequence[str] = (),
    space: bool = True,
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
        knowing: as in `marked_pairs`.
        space: as in `marked_pairs`.

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
        knowing=knowing,
        space=space,
    )


def _mark_name(name: str, text: str) -> str:
    if name == ANSWER_POSITION:
        raise InputError(
            f"{name!r} is always the final token; name the mark otherwise in {text!r}."
        )
    if name in (BEGINNING, UNMARKED) or name.endswith(_MADE):
        raise InputError(f"{name!r} is made of other marks; name the mark otherwise in {text!r}.")
    return name


def _check_words(name: str, words: str, text: str) -> None:
    if not words or any(sign in words for sign in "[]|"):
        raise _other_form(text)
    if words != words.strip():
        raise InputError(f"Mark the word alone, without spaces: {words!r} ({name}) in {text!r}.")


def _check_nesting(marks: Sequence[tuple[str, Span]], knowing: Sequence[str], text: str) -> None:
    blind = [mark for mark in marks if mark[0] not in knowing]
    for (outer, (_, end)), (inner, (start, _)) in pairwise(blind):
        if start < end:
            raise InputError(
                f"{inner!r} stands inside {outer!r} in {text!r}; words have one role, so declare "
                "one of the two as knowing the answer, or mark other words."
            )


def _check_knowing(texts: Sequence[MarkedText]) -> None:
    if texts and set(texts[0].knowing) - set(texts[0].names):
        missing = ", ".join(sorted(set(texts[0].knowing) - set(texts[0].names)))
        raise InputError(f"No mark has the name {missing}, declared as knowing the answer.")


def _other_form(text: str) -> InputError:
    return InputError(f"A mark is written [[name|word]]; {text!r} has brackets of another form.")


def _listed(given: "str | Sequence[Any]") -> Sequence[Any]:
    return [given] if isinstance(given, str) else given


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
    return ", ".join(text.names) or "no position"
