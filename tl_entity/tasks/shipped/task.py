"""What a task that ships is: words, how a pair of texts is drawn from them, where it comes from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

Word = tuple[str, ...]
"""What is drawn together: a word alone, or its forms, as `("key", "keys")`."""

Words = Mapping[str, Sequence[Word]]
"""Lists of words by name."""


@dataclass(frozen=True)
class TextPair:
    """A clean text, a corrupt one, and what may follow the clean one.

    Attributes:
        clean: a text with marks.
        corrupt: a text with the same marks, after which the answer is wrong, or no more likely than
            the foil.
        answer: what should follow the clean text.
        foil: what should not.
    """

    clean: str
    corrupt: str
    answer: str
    foil: str


@dataclass(frozen=True)
class Task:
    """A task of one-word answers, with lists of words.

    Attributes:
        name: what `task_pairs` is given.
        says: what is asked, in a sentence.
        source: where the task comes from.
        example: a clean prompt with its answer and foil.
        drawer: from a tokenizer and the words that can be used to a function that draws a pair.
        words: lists of words; one is used if all its forms are a single token.
        needs: how many words of each list there must be.
        knowing: names of the marks that depend on the answer.
        space: whether the answer follows after a space.
    """

    name: str
    says: str
    source: str
    example: str
    drawer: Callable[[PreTrainedTokenizerBase, Words], Callable[[Random], TextPair]]
    words: Words
    needs: Mapping[str, int]
    knowing: tuple[str, ...] = ()
    space: bool = True
