"""The word-level tokenizer of the default pair: one token a word, letter, number or mark."""

import json
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tl_entity._typing import checked
from tl_entity.output import write_atomically
from tl_entity.tasks.boxes import LABELS
from tl_entity.tasks.nouns import OBJECTS

UNKNOWN, START, PADDING = "<unk>", "<s>", "<pad>"
LARGEST_NUMBER = 99
MARKS = (",", ".", ";", "=", "->", "+", "-")
SENTENCE_WORDS = (
    *("The", "the", "is", "was", "in", "on", "under", "next", "to"),
    *("Box", "contains", "not", "and", "also", "there", "are"),
)
VARIABLES = tuple(string.ascii_lowercase)
"""The names that variables have in look-up texts."""

VOCABULARY: tuple[str, ...] = (
    UNKNOWN,
    START,
    PADDING,
    *MARKS,
    *SENTENCE_WORDS,
    *VARIABLES,
    *(str(number) for number in range(LARGEST_NUMBER + 1)),
    *LABELS,
    *OBJECTS,
)
"""All tokens, in the order of their ids."""

_MAX_LENGTH = 256


@checked
def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer over `VOCABULARY` that puts `<s>` first; what it doesn't know is `<unk>`."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    words_and_marks = pre_tokenizers.Split(Regex(r"\w+|->|[^\w\s]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), words_and_marks]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A $B",
        special_tokens=[(START, VOCABULARY.index(START))],
    )
    # This decoder joins words with a space and leaves none before a comma or full stop.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


@checked
def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder."""
    build_tokenizer().save_pretrained(folder)
    # The class name that every transformers release with fast tokenizers knows; newer ones write
    # another name, which older ones cannot load.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
