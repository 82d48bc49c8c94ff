"""Prompts as a person reads them: text with what is named in it, in a terminal or a notebook."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity.errors import InputError

if TYPE_CHECKING:
    from tl_entity.tasks.batches import PromptBatch

PROMPTS_SHOWN = 10
"""Prompts shown in a notebook where nothing else is said."""

PROMPTS_PRINTED = 5
"""Prompts that are printed."""

_NONE, _SPACE = "—", "␣"
_FIRST, _LAST = ".first", ".last"
_GOLDEN_ANGLE = 137.508  # successive hues stay far apart, however many there are
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:.2em .6em"


@dataclass(frozen=True)
class Named:
    """Tokens of one prompt that a name stands for, next to each other.

    Attributes:
        name: the name.
        start: the first of them.
        end: the one behind the last.
    """

    name: str
    start: int
    end: int


@dataclass(frozen=True, repr=False)
class ShownPrompts:
    """Some prompts of a batch, or of batches that go together row by row.

    Attributes:
        kind: what the batch is called.
        texts: the batches, under their column's name.
        words: token ids of one token a prompt, such as answers, under their column's name.
        evaluation: how a model answers the first batch, such as `evaluate` gives, or None.
        n: how many prompts are shown.

    Raises:
        InputError: if the evaluation is of more or fewer prompts.
    """

    kind: str
    texts: "dict[str, PromptBatch]"
    words: dict[str, Tensor]
    evaluation: Any = None
    n: int = PROMPTS_SHOWN

    def __post_init__(self) -> None:
        if self.evaluation is not None and len(self.evaluation) != len(self._first):
            raise InputError(
                f"An evaluation of {len(self.evaluation)} prompts can't be shown beside "
                f"{len(self._first)}; give that of the same prompts."
            )

    @property
    def _first(self) -> "PromptBatch":
        return next(iter(self.texts.values()))

    def __repr__(self) -> str:
        shown = min(self.n, len(self._first))
        lines = [_heading(self.kind, self._first)]
        for row in range(shown):
            words = [f"{name} {word}" for name, word in self._words_of(row).items()]
            lines.append(f"{row:>3}  " + "\n     ".join(self._lines_of(row)))
            lines[-1] += f"  → {', '.join(words)}" if words else ""
        if shown < len(self._first):
            lines.append(f"     and {len(self._first) - shown} more")
        return "\n".join(lines)

    def _lines_of(self, row: int) -> list[str]:
        label = len(self.texts) > 1
        return [
            (f"{name}: " if label else "") + marked_text(batch, row)
            for name, batch in self.texts.items()
        ]

    def _words_of(self, row: int) -> dict[str, str]:
        """What stands beside the texts of a row."""
        tokenizer = self._first.tokenizer
        words = {name: _word(tokenizer, int(ids[row])) for name, ids in self.words.items()}
        if self.evaluation is not None:
            likely = float(self.evaluation.answer_log_probability[row].double().exp())
            words["probability"] = f"{likely:.3f}"
            words["model says"] = _word(tokenizer, int(self.evaluation.predicted[row]))
        return words

    def _repr_html_(self) -> str:
        shown = min(self.n, len(self._first))
        rows: list[str] = []
        for row in range(shown):
            texts = [_html_text(batch, row) for batch in self.texts.values()]
            cells = [*texts, *map(html.escape, self._words_of(row).values())]
            rows.append("".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells))
        columns = [*self.texts, *(self._words_of(0) if shown else self.words)]
        head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in columns)
        body = "\n".join(f"<tr>{cells}</tr>" for cells in rows)
        more = f"<p>{shown} of {len(self._first)} shown</p>" if shown < len(self._first) else ""
        return (
            f"<p><b>{html.escape(_heading(self.kind, self._first).splitlines()[0])}</b></p>\n"
            f"{_legend(self.texts.values())}"
            f'<div style="overflow-x:auto"><table><tr>{head}</tr>\n{body}</table></div>{more}'
        )


def marked_text(batch: "PromptBatch", row: int) -> str:
    """A prompt as text with its named positions as marks, `[[name|word]]`; the ids of its tokens
    where the batch has no tokenizer."""
    words = token_texts(batch, row)
    named = _named(batch, row)
    text = ""
    for i, word in enumerate(words):
        bare = word.lstrip(" ")
        # What knows the answer stands inside of what does not, as it is written.
        begin = sorted(
            (n for n in named if n.start == i), key=lambda n: (-n.end, n.name in batch.knowing)
        )
        text += word[: len(word) - len(bare)] + "".join(f"[[{n.name}|" for n in begin) + bare
        text += "]]" * sum(n.end == i + 1 for n in named)
    return text.lstrip(" ")


def _heading(kind: str, batch: "PromptBatch") -> str:
    lengths = batch.mask.sum(1)
    shortest, longest = (int(lengths.min()), int(lengths.max())) if len(batch) else (0, 0)
    size = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    what = {"PairBatch": "pairs"}.get(kind, "prompts")
    lines = [f"{kind}: {len(batch)} {what}, {size} tokens"]
    lines.append(f"     positions: {', '.join([*batch.positions, *batch.spans])}")
    if batch.role_names:
        lines.append(f"     roles: {', '.join(batch.role_names)}")
    if batch.knowing:
        lines.append(f"     depend on what is asked: {', '.join(batch.knowing)}")
    return "\n".join(lines)


def token_texts(batch: "PromptBatch", row: int) -> list[str]:
    """What each token of a prompt adds to its text."""
    ids: list[int] = batch.tokens[row][batch.mask[row]].tolist()
    if batch.tokenizer is None:
        return [f" {token}" for token in ids]
    texts: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        # All tokens up to here, since a token alone may lose the space ahead of it.
        whole = _decoded(batch.tokenizer, ids[:end])
        texts.append(whole[len(before) :])
        before = whole
    return texts


def _word(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    if token < 0:
        return _NONE
    return str(token) if tokenizer is None else _decoded(tokenizer, [token]).strip(" ") or _SPACE


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    return text.replace("\n", "⏎")


def _named(batch: "PromptBatch", row: int) -> list[Named]:
    """The named tokens of a prompt, from its first real token on, without the final one."""
    start = int(batch.mask[row].int().argmax())
    there = {*batch.positions, *batch.spans, *batch.role_names}
    found: list[Named] = []
    for name in [*batch.positions, *batch.spans]:
        stem = name.removesuffix(_FIRST).removesuffix(_LAST)
        if name == "last" or (stem != name and stem in there) or name + _FIRST in there:
            continue
        found += [Named(name, i, i + 1) for i in _indices(batch.where(name)[row], start)]
    stems = [name.removesuffix(_FIRST) for name in there if name.endswith(_FIRST)]
    for stem in sorted(stem for stem in stems if stem in there):
        begins = _indices(batch.where(stem + _FIRST)[row], start)
        inside = set(_indices(batch.where(stem)[row], start))
        for begin in begins:
            end = begin + 1
            while end in inside and end not in begins:
                end += 1
            found.append(Named(stem, begin, end))
    return found


def _indices(where: Tensor, start: int) -> list[int]:
    return [int(i) - start for i in where.nonzero()[:, 0]]


def _html_text(batch: "PromptBatch", row: int) -> str:
    """The tokens of a prompt, coloured by role, with the names of positions above them."""
    named = _named(batch, row)
    roles = _roles_of(batch, row)
    pieces: list[str] = []
    for i, word in enumerate(token_texts(batch, row)):
        bare = word.lstrip(" ")
        names = ", ".join(n.name for n in named if n.start <= i < n.end)
        known = any(n.name in batch.knowing for n in named if n.start <= i < n.end)
        above = ", ".join(n.name for n in named if n.end == i + 1)
        mark = f'<sup style="opacity:.75">{html.escape(above)}</sup>' if above else ""
        line = f";border-bottom:2px {'dotted' if known else 'solid'}" if names else ""
        role = roles[i]
        title = html.escape(" · ".join(part for part in (f"token {i}", role, names) if part))
        style = f"background:{_colour(batch, role)}{line}" if role else line.removeprefix(";")
        pieces.append(
            f'{word[: len(word) - len(bare)]}<span style="{style}" title="{title}">'
            f"{html.escape(bare) or _SPACE}</span>{mark}"
        )
    return "".join(pieces)


def _roles_of(batch: "PromptBatch", row: int) -> list[str]:
    if batch.roles is None:
        return [""] * int(batch.mask[row].sum())
    return [batch.role_names[role] for role in batch.roles[row][batch.mask[row]].tolist()]


def _colour(batch: "PromptBatch", role: str) -> str:
    # Half transparent, so that it is readable on light and dark pages.
    hue = round(batch.role_names.index(role) * _GOLDEN_ANGLE) % 360
    return f"hsla({hue},80%,50%,.28)"


def _legend(batches: "Sequence[PromptBatch] | Any") -> str:
    """The roles and their colours; dotted lines are positions that know the answer."""
    batch = next(iter(batches))
    if not batch.role_names:
        return ""
    roles = " ".join(
        f'<span style="background:{_colour(batch, role)};padding:0 .3em">{html.escape(role)}</span>'
        for role in batch.role_names
    )
    known = "; dotted: depends on what is asked" if batch.knowing else ""
    return f"<p>roles: {roles}{html.escape(known)}</p>\n"
