"""A checkpoint's own tokenizer, exactly as it is: no token is added that the model never saw.

Where a folder has a tokenizer.json, that file says what the tokens are. transformers picks a class
by names in config.json and tokenizer_config.json, and some classes, in some versions, build another
tokenizer around the file's vocabulary; so the file is read by none of them, and what transformers
made of it is compared with what the tokenizers library makes of it.
"""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_entity.errors import InputError
from tl_entity.models.files import reason

TOKENIZER_JSON = "tokenizer.json"
VOCABULARIES = (TOKENIZER_JSON, "*.model", "vocab*", "*.tiktoken", "tekken.json")
"""Files that a tokenizer's vocabulary is found in."""

ADAPTER_VOCABULARIES = (TOKENIZER_JSON, "tokenizer.model", "vocab.json", "tekken.json")
"""Files by which an adapter's folder has a tokenizer of its own."""

STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
"""What a tokenizer does before and after its vocabulary is asked."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

PROBES = (
    "The apple is in Box A, the bell is in Box B. Box A contains the",
    " two  spaces,   three\n\nnew\tlines\r\n ",
    "CamelCase UPPER lower snake_case don't I'LL x->3; y=5",
    "0 12 345 6789 31415926 3.14 1,000",
    "na\u00efve e\u0301 \u00df \ufb01 \u65e5\u672c\u8a9e \u0645\u0631\u062d \U0001f642\u200d",
    "",
)
"""Texts that tokenizers split in different ways: spaces, capitals, digits, what is not ASCII.
A file's added tokens are tried besides."""

N_KNOWN = 200
"""How many of a vocabulary's own tokens are tried too, at least, if it has so many."""


def read_tokenizer(folder: Path, gguf_file: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or in a GGUF file of which a link lies there alone.

    It gives the tokens that the folder's tokenizer.json says, with the special tokens that this
    file puts, whatever tokenizer_config.json says of class, `add_bos_token` or `add_eos_token`.
    Without such a file it is what transformers makes of the others.

    Raises:
        InputError: if there is none that can be read, or transformers can't represent the file.
    """
    try:
        if gguf_file is not None:
            # Not by way of AutoTokenizer, which reads the whole file a second time, and slowly.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                folder, gguf_file=gguf_file.name, local_files_only=True
            )
        elif (folder / TOKENIZER_JSON).is_file():
            tokenizer = _read_tokenizer_json(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # Where files are missing, some kinds come without a vocabulary instead of an error.
        is_empty = not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds, some of them bare Exception
        place = gguf_file or folder
        if gguf_file is None and not _has_any(folder, VOCABULARIES):
            raise _missing(folder) from None
        raise InputError(f"{place} has no tokenizer that can be read: {reason(error)}") from None
    if is_empty:
        raise _missing(gguf_file or folder)
    if tokenizer.unk_token is None and isinstance(tokenizer, PreTrainedTokenizerFast):
        # A word that has no token must be told from the others.
        tokenizer.unk_token = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def read_adapter_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that an adapter's folder holds; None where its base's is the one.

    Raises:
        InputError: if it can't be read.
    """
    return read_tokenizer(folder) if _has_any(folder, ADAPTER_VOCABULARIES) else None


def fit_to_vocabulary(tokenizer: PreTrainedTokenizerBase, d_vocab: int, name: str) -> None:
    """Make sure that a tokenizer belongs to a model, as far as the number of its tokens tells.

    Some fine-tunes add a padding token that the embedding has no row for: another takes its place,
    since padding is masked. Other added tokens without a row may stay, as long as the tokenizer
    does not put them into every text.

    Args:
        tokenizer: changed in place where its padding token has no row.
        d_vocab: rows of the embedding.
        name: names the tokenizer in messages.

    Raises:
        InputError: naming a token that the embedding has no row for.
    """
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= d_vocab}
    if not beyond:
        return
    if tokenizer.pad_token_id in beyond:
        others = (tokenizer.eos_token, tokenizer.unk_token)
        tokenizer.pad_token = next((t for t in others if t not in (None, *beyond.values())), None)
    reads: Any = tokenizer
    everywhere, added = reads("a")["input_ids"], reads.get_added_vocab()
    unusable = sorted(i for i, token in beyond.items() if token not in added or i in everywhere)
    if unusable:
        first = unusable[0]
        raise InputError(
            f"{name} is another model's: its token {beyond[first]!r} has the number {first}, and "
            f"the model has embeddings for {d_vocab} tokens only; give the model's own tokenizer."
        )


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with its beginning-of-sequence token by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _read_tokenizer_json(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a tokenizer.json; names and the chat template come from the other files."""
    file = folder / TOKENIZER_JSON
    reference = Tokenizer.from_file(str(file))
    # Settings of a training run, which transformers leaves out of account too.
    reference.no_truncation()
    reference.no_padding()
    # Of no special class: some rebuild what the file says, or bring tokens of their own.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
        folder,
        local_files_only=True,
        # What models of these families take; the default has another input besides.
        model_input_names=["input_ids", "attention_mask"],
    )
    if tokenizer.bos_token is None and tokenizer.eos_token is None:
        _name_special_tokens(tokenizer, folder)
    backend = tokenizer.backend_tokenizer
    for stage in STAGES:
        setattr(backend, stage, getattr(reference, stage))
    for token in reference.get_added_tokens_decoder().values():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    differing = _first_difference(tokenizer, reference)
    if differing is not None:
        raise InputError(
            f"transformers {transformers.__version__} can't represent {file}: it splits "
            f"{differing[:50]!r} into other tokens than the file says; use another version."
        )
    return tokenizer


def _name_special_tokens(tokenizer: Any, folder: Path) -> None:
    """Old checkpoints name no special tokens and leave them to the tokenizer's class."""
    try:
        by_class: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # a class that is unknown, or can't hold this vocabulary
        return
    vocabulary = tokenizer.get_vocab()
    for name in SPECIAL_TOKENS:
        token = getattr(by_class, name)
        if getattr(tokenizer, name) is None and token in vocabulary:
            setattr(tokenizer, name, token)


def _first_difference(tokenizer: Any, reference: Tokenizer) -> str | None:
    """The first text that a tokenizer does not split as its tokenizer.json says; None if none."""
    added = reference.get_added_tokens_decoder().values()
    specials = "".join(f"a{token.content} b {token.content}" for token in added)
    size = reference.get_vocab_size()
    known = (reference.id_to_token(index) for index in range(0, size, max(1, size // N_KNOWN)))
    for text in (*PROBES, specials, " ".join(token for token in known if token)):
        ours, theirs = tokenizer(text).encodings[0], reference.encode(text)
        if ours.ids != theirs.ids or ours.offsets != theirs.offsets:
            return text
    return None


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _missing(place: Path) -> InputError:
    return InputError(
        f"{place} has no tokenizer: there is no vocabulary in it. Put the checkpoint's own "
        "tokenizer.json or tokenizer.model there, or give tokenizer=."
    )
