"""From texts to token ids: what a tokenizer puts before a text stands there once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError

Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens.

    Attributes:
        ids: token ids.
        offsets: for each token the characters it covers; none, (0, 0), for what the tokenizer puts.
    """

    ids: list[int]
    offsets: list[Span]


@checked
def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[EncodedText]:
    """The tokens of each text, which is to be continued.

    The special tokens that the tokenizer puts before a text are there, but none that the text
    begins with already: one that a chat template rendered has its beginning-of-sequence token, and
    gets the tokens that `apply_chat_template` itself would give it. What the tokenizer puts after a
    text, such as an end-of-sequence token, is left out, since an answer follows.

    Raises:
        InputError: if the tokenizer can't tell which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} can't tell which characters a token covers; "
            "save the checkpoint with a fast tokenizer (tokenizer.json)."
        )
    if not texts:
        return []
    # Masks and types of tokens would be made of every text, and nobody asks for them.
    encoded = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False)
    encodings: Any = encoded.encodings
    return [_as_prompt(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


def _as_prompt(text: str, encoding: Any) -> EncodedText:
    ids: list[int] = encoding.ids
    offsets: list[Span] = encoding.offsets
    sequences: list[int | None] = encoding.sequence_ids
    if None not in sequences:
        return EncodedText(ids, offsets)
    # The tokenizer's own additions belong to no sequence, special tokens in the text do.
    own = [i for i, sequence in enumerate(sequences) if sequence is not None]
    if not own:
        return EncodedText(ids, offsets)
    first, end = own[0], own[-1] + 1
    # Templates may render white space before their first token.
    begins = next((ids[i] for i in own if text[slice(*offsets[i])].strip()), None)
    kept = ids.index(begins) if begins in ids[:first] else first
    return EncodedText(ids[:kept] + ids[first:end], offsets[:kept] + offsets[first:end])
