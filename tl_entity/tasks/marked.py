"""From texts with marked spans to tokens with named positions, for any tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import ANSWER_POSITION, NO_ROLE, PromptBatch
from tl_entity.tasks.encode import Span, encode

NO_ANSWER = -1
"""Stands for the answer's token id in a prompt that has no right answer."""

BEGINNING = "beginning"
"""The role of a prompt's first token and of special tokens: heads that have nothing to read look
there."""

OTHER = "other"
"""The role of tokens that no span gives one."""


@dataclass(frozen=True)
class MarkedText:
    """A prompt, the parts of it that have a name, and the word that should follow.

    Attributes:
        text: the prompt, without the answer.
        spans: for each name the characters it covers; each must be one token.
        answer: the word that follows after a space, or None.
        roles: the characters that each role covers, in the order of the text; a role may come in
            several places. Without any, the prompt's tokens have no roles.
        knowing: names of spans and roles that depend on what is asked.
    """

    text: str
    spans: Mapping[str, Span]
    answer: str | None = None
    roles: Sequence[tuple[str, Span]] = ()
    knowing: tuple[str, ...] = ()


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

    Raises:
        InputError: if there is no text, the texts name different positions, the tokenizer can't
            tell which characters a token covers, a marked span or an answer is not exactly one
            token (the message shows the text and its tokens), or only some texts have roles.
    """
    if not texts:
        raise InputError("There are no prompts to tokenize.")
    names = tuple(texts[0].spans)
    rows: list[list[int]] = []
    answers: list[int] = []
    positions: dict[str, list[int]] = {name: [] for name in names}
    roles: list[list[str]] = []
    answered = iter(
        encode(
            tokenizer, [f"{text.text} {text.answer}" for text in texts if text.answer is not None]
        )
    )
    for text, encoded in zip(texts, encode(tokenizer, [text.text for text in texts]), strict=True):
        ids, offsets = encoded.ids, encoded.offsets
        if tuple(text.spans) != names:
            raise InputError(
                f"{text.text!r} names the positions {', '.join(text.spans)}; "
                f"the first prompt has {', '.join(names)}."
            )
        for name in names:
            positions[name].append(_token_of_span(tokenizer, text, name, ids, offsets))
        whole = None if text.answer is None else next(answered).ids
        answers.append(_answer_token(tokenizer, text, ids, whole))
        rows.append(ids)
        roles.append(_roles_of_tokens(text, offsets))
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    mask = torch.arange(width) < lengths[:, None]
    role_names, role_ids = _numbered_roles(texts, roles, width)
    return PromptBatch(
        tokens=torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        answers=torch.tensor(answers),
        positions={
            **{name: torch.tensor(indices) for name, indices in positions.items()},
            ANSWER_POSITION: lengths - 1,
        },
        attention_mask=None if bool(mask.all()) else mask.long(),
        roles=role_ids,
        role_names=role_names,
        knowing=tuple(dict.fromkeys(name for text in texts for name in text.knowing)),
    )


def _token_of_span(
    tokenizer: PreTrainedTokenizerBase,
    text: MarkedText,
    name: str,
    ids: Sequence[int],
    offsets: Sequence[Span],
) -> int:
    first, end = text.spans[name]
    word = text.text[first:end]
    covering = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > first]
    # A token's characters may include the space before the word, but nothing else.
    if len(covering) == 1 and ids[covering[0]] != tokenizer.unk_token_id:
        start, stop = offsets[covering[0]]
        if text.text[start:stop].strip() == word:
            return covering[0]
    shown = " ".join(tokenizer.convert_ids_to_tokens([ids[i] for i in covering]))
    raise InputError(
        f"{word!r} ({name}) in {text.text!r} is not one token of this tokenizer: {shown!r}."
    )


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
    texts: Sequence[MarkedText], roles: Sequence[Sequence[str]], width: int
) -> tuple[tuple[str, ...], Tensor | None]:
    """The names of all roles, in the order in which they first come, and each token's."""
    given = sum(bool(text.roles) for text in texts)
    if given == 0:
        return (), None
    if given < len(texts):
        raise InputError(f"{given} of {len(texts)} prompts say which roles their tokens have.")
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
