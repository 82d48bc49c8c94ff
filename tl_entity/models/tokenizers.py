"""A checkpoint's own tokenizer, exactly as it is: no token is added that the model never saw."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_entity.errors import InputError
from tl_entity.models.files import reason

VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
"""Files that a tokenizer's vocabulary is found in."""


def read_tokenizer(folder: Path, gguf_file: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or in a GGUF file of which a link lies there alone."""
    try:
        if gguf_file is None:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        else:
            # Not by way of AutoTokenizer, which reads the whole file a second time, and slowly.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                folder, gguf_file=gguf_file.name, local_files_only=True
            )
        # Where files are missing, some kinds come without a vocabulary instead of an error.
        is_empty = not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except Exception as error:  # the library raises many kinds, some of them bare Exception
        place = gguf_file or folder
        if gguf_file is None and not any(map(list, map(folder.glob, VOCABULARIES))):
            raise _missing(folder) from None
        raise InputError(f"{place} has no tokenizer that can be read: {reason(error)}") from None
    if is_empty:
        raise _missing(gguf_file or folder)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _missing(place: Path) -> InputError:
    return InputError(
        f"{place} has no tokenizer: there is no vocabulary in it. Put the checkpoint's own "
        "tokenizer.json or tokenizer.model there, or give tokenizer=."
    )


def replace_missing_padding(tokenizer: PreTrainedTokenizerBase, d_vocab: int) -> None:
    """Some fine-tunes add a padding token that the embedding has no row for: use another."""
    padding: Any = tokenizer.pad_token_id
    if padding is not None and padding >= d_vocab:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with its beginning-of-sequence token by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
