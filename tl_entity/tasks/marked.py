"""From texts with marked spans to tokens with named positions and roles, for any tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import ANSWER_POSITION, FIRST, LAST, NO_ROLE, PromptBatch
from tl_entity.tasks.encode import EncodedText, Span, encode

NO_ANSWER = -1
"""Stands for the answer's token id in a prompt that has no right answer."""

BEGINNING = "beginning"
"""The role of a prompt's first token and of special tokens: heads that have nothing to read look
there."""

OTHER = "other"
"""The role of tokens that no span gives one."""

UNMARKED = "unmarked"
"""The role of tokens of a text whose marks, if any, all depend on what is asked."""

BEFORE, AFTER = ".before", ".after"
"""What is put after the name of a mark to name the tokens ahead of it, if it is the first mark, or
those behind it up to the next."""


@dataclass(frozen=True)
class MarkedText:
    """A prompt, the parts of it that have a name, and the word that should follow.

    Attributes:
        text: the prompt, without the answer.
        spans: for each name the characters it covers; each must be one token, unless it is among
            the marks.
        answer: the word that follows, or None.
        roles: the characters that each role covers, in the order of the text; a role may come in
            several places. Without any, the prompt's tokens have no roles.
        knowing: names of spans, roles and marks that depend on what is asked.
        marks: names with the characters they cover, in the order of the text. They may be of
            several tokens, and a name may come in several places. Roles then follow from the marks.
        space: whether the answer follows after a space.
    """

    text: str
    spans: Mapping[str, Span]
    answer: str | None = None
    roles: Sequence[tuple[str, Span]] = ()
    knowing: tuple[str, ...] = ()
    marks: Sequence[tuple[str, Span]] | None = None
    space: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its spans and marks."""
        if self.marks is None:
            return tuple(self.spans)
        return tuple(sorted({*self.spans, *(name for name, _ in self.marks)}))


@checked
def one_token_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[str, ...]:
    """Those of `words` that are a single token when they follow another word and a space."""
    carrier = "the"
    alone, *longer = encode(tokenizer, [carrier, *(f"{carrier} {word}" for word in words)])
    return tuple(
        word
        for word, text in zip(words, longer, strict=True)
        if len(text.ids) == len(alone.ids) + 1 and text.ids[-1] != tokenizer.unk_token_id
    )


@checked
def tokenize_marked(texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    """Tokenize prompts and find each named span's token, from what the tokenizer says each token
    covers; shorter prompts are padded on the right and masked.

    Special tokens are put as `encode` says. The position `"last"` is the final token of each
    prompt; answers are `NO_ANSWER` where a text has none. Tokens have the role that covers their
    first character other than a space, `"other"` where none does, and the first token of a prompt
    is its `"beginning"`.

    A mark of one token in every prompt is a named position; where it has several tokens, `.first`
    and `.last` after its name are, or, where it has several places, the first and last tokens of
    all of them. Tokens of a mark have its name as their role, unless it depends on what is asked.
    Tokens behind it have the role `.after` its name, up to the next mark, those ahead of the first
    mark `.before` its name; the first and the final token are `"beginning"` and `"last"` unless
    they are marked. All others of a text without such marks are `"unmarked"`.

    Raises:
        InputError: if there is no text, the texts name different positions, the tokenizer can't
            tell which characters a token covers, a mark is not of whole tokens, a span that is no
            mark or an answer is not exactly one token (the message shows the text and its tokens),
            or only some texts have roles.
    """
    if not texts:
        raise InputError("There are no prompts to tokenize.")
    names = texts[0].names
    encoded = encode(tokenizer, [text.text for text in texts])
    answered = iter(
        encode(
            tokenizer,
            [
                f"{text.text}{' ' if text.space else ''}{text.answer}"
                for text in texts
                if text.answer is not None
            ],
        )
    )
    prompts: list[_Tokens] = []
    for text, tokens in zip(texts, encoded, strict=True):
        if text.names != names:
            raise InputError(
                f"{text.text!r} names the positions {', '.join(text.names)}; "
                f"the first prompt has {', '.join(names)}."
            )
        whole = None if text.answer is None else next(answered).ids
        prompts.append(_Tokens.read(tokenizer, text, tokens, whole))
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    width = int(lengths.max())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    mask = torch.arange(width) < lengths[:, None]
    role_names, role_ids = _numbered_roles(texts, prompts, width)
    knowing = tuple(dict.fromkeys(name for text in texts for name in text.knowing))
    positions, spans = _named_tokens(names, prompts, width, role_names)
    return PromptBatch(
        tokens=torch.tensor([prompt.ids + [pad] * (width - len(prompt.ids)) for prompt in prompts]),
        answers=torch.tensor([prompt.answer for prompt in prompts]),
        positions={**positions, ANSWER_POSITION: lengths - 1},
        attention_mask=None if bool(mask.all()) else mask.long(),
        roles=role_ids,
        role_names=role_names,
        knowing=tuple(
            name
            for known in knowing
            for name in (known, known + FIRST, known + LAST)
            if name in positions or name in spans or name in role_names
        ),
        spans=spans,
        tokenizer=tokenizer,
    )


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one text.

    Attributes:
        ids: token ids.
        places: for each name the tokens of each of its places.
        roles: the role of each token.
        ends_open: whether the final token has a role of its own, being in no mark.
        answer: the answer's token id.
    """

    ids: list[int]
    places: dict[str, list[list[int]]]
    roles: list[str]
    ends_open: bool
    answer: int

    @classmethod
    def read(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: MarkedText,
        encoded: EncodedText,
        whole: Sequence[int] | None,
    ) -> "_Tokens":
        marks = text.marks or ()
        marked = [name for name, _ in marks]
        places = {
            name: [_tokens_of_span(tokenizer, text, name, span, encoded, one=True)]
            for name, span in text.spans.items()
            if name not in marked
        }
        for name, span in marks:
            tokens = _tokens_of_span(tokenizer, text, name, span, encoded, one=False)
            places.setdefault(name, []).append(tokens)
        answer = _answer_token(tokenizer, text, encoded.ids, whole)
        if text.marks is None:
            roles = _roles_of_tokens(text, encoded.offsets)
            return cls(encoded.ids, places, roles, False, answer)
        named = {
            token: name
            for name, of_name in places.items()
            if name not in text.knowing
            for tokens in of_name
            for token in tokens
        }
        ends_open = len(encoded.ids) - 1 not in named
        return cls(encoded.ids, places, _roles_of_marks(named, encoded.offsets), ends_open, answer)


def _named_tokens(
    names: Sequence[str], prompts: Sequence[_Tokens], width: int, role_names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The positions and the spans of a batch: names of one token in every prompt are positions."""
    positions: dict[str, Tensor] = {}
    spans: dict[str, Tensor] = {}

    def add(name: str, tokens: Sequence[Sequence[int]]) -> None:
        if all(len(of_prompt) == 1 for of_prompt in tokens):
            positions[name] = torch.tensor([index for (index,) in tokens])
        elif name not in role_names:
            spans[name] = torch.zeros(len(tokens), width, dtype=torch.bool)
            for row, of_prompt in enumerate(tokens):
                spans[name][row, of_prompt] = True

    for name in names:
        places = [prompt.places[name] for prompt in prompts]
        add(name, [[*chain(*of_prompt)] for of_prompt in places])
        if name not in positions:
            add(name + FIRST, [[place[0] for place in of_prompt] for of_prompt in places])
            add(name + LAST, [[place[-1] for place in of_prompt] for of_prompt in places])
    return positions, spans


def _tokens_of_span(
    tokenizer: PreTrainedTokenizerBase,
    text: MarkedText,
    name: str,
    span: Span,
    encoded: EncodedText,
    *,
    one: bool,
) -> list[int]:
    first, end = span
    word = text.text[first:end]
    covering = [
        i for i, (start, stop) in enumerate(encoded.offsets) if start < end and stop > first
    ]
    ids = [encoded.ids[i] for i in covering]
    # The first token's characters may include the space before the word, but nothing else.
    if covering and (len(covering) == 1 or not one) and tokenizer.unk_token_id not in ids:
        start, stop = encoded.offsets[covering[0]][0], encoded.offsets[covering[-1]][1]
        if text.text[start:stop].strip() == word:
            return covering
    shown = " ".join(tokenizer.convert_ids_to_tokens(ids))
    many = "one token" if one else "one token or several whole ones"
    raise InputError(
        f"{word!r} ({name}) in {text.text!r} is not {many} of this tokenizer: {shown!r}."
    )


def _roles_of_marks(named: Mapping[int, str], offsets: Sequence[Span]) -> list[str]:
    """The role of each token, where some are named by marks."""
    around = named[min(named)] + BEFORE if named else UNMARKED
    roles: list[str] = []
    for token, (start, stop) in enumerate(offsets):
        if token in named:
            around = named[token] + AFTER
        special = token == 0 or start == stop  # a special token covers no characters
        roles.append(named.get(token, BEGINNING if special else around))
    return roles


def _roles_of_tokens(text: MarkedText, offsets: Sequence[Span]) -> list[str]:
    """The role of each token of a text."""
    words = text.text
    role_at = [OTHER] * (len(words) + 1)
    for role, (first, end) in reversed(text.roles):  # where two overlap, the first one holds
        role_at[first:end] = [role] * (end - first)
    roles = [BEGINNING] * len(offsets)
    for index in range(1, len(offsets)):
        start, stop = offsets[index]
        if start < stop:  # a special token covers no characters, and begins
            while start < stop and words[start].isspace():
                start += 1
            roles[index] = role_at[start]
    return roles


def _numbered_roles(
    texts: Sequence[MarkedText], prompts: Sequence[_Tokens], width: int
) -> tuple[tuple[str, ...], Tensor | None]:
    """The names of all roles, in the order in which they first come, and each token's."""
    given = sum(bool(text.roles) or text.marks is not None for text in texts)
    if given == 0:
        return (), None
    if given < len(texts):
        raise InputError(f"{given} of {len(texts)} prompts say which roles their tokens have.")
    roles = [list(prompt.roles) for prompt in prompts]
    # The final token has a role of its own, unless a mark of some prompt has it.
    if all(prompt.ends_open for prompt in prompts):
        for row in roles:
            row[-1] = ANSWER_POSITION
    names = tuple(dict.fromkeys(role for row in roles for role in row))
    number = {name: index for index, name in enumerate(names)}
    padded = [[number[role] for role in row] + [NO_ROLE] * (width - len(row)) for row in roles]
    return names, torch.tensor(padded)


def _answer_token(
    tokenizer: PreTrainedTokenizerBase,
    text: MarkedText,
    ids: Sequence[int],
    whole: Sequence[int] | None,
) -> int:
    """The answer's token, where the tokens of the prompt with its answer behind it are `whole`."""
    if whole is None:
        return NO_ANSWER
    if list(whole[:-1]) == list(ids) and whole[-1] != tokenizer.unk_token_id:
        return whole[-1]
    shown = " ".join(tokenizer.convert_ids_to_tokens(list(whole[len(ids) - 1 :])))
    raise InputError(
        f"The answer {text.answer!r} to {text.text!r} is not one token of this tokenizer: "
        f"{shown!r}."
    )
