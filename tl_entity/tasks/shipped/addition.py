"""Addition of two numbers of two digits, whose sum has two digits too.

`34 plus 52 is 86, 21 plus 12 is 33, 43 plus 25 is` is followed by ` 68`, after two examples that
are drawn afresh. Tokenizers that write every digit by itself are asked for the first digit of the
sum only, which depends on the ones too wherever they carry. The corrupt text adds two other
numbers, whose sum begins otherwise; it is the foil.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.tasks.encode import encode
from tl_entity.tasks.shipped.task import Task, TextPair, Words

_EXAMPLE = "{} plus {} is {}, "
_QUESTION = "[[first|{}]] plus [[second|{}]] is"


def _drawer(tokenizer: PreTrainedTokenizerBase, words: Words) -> Callable[[Random], TextPair]:
    space, n_digits = _how_sums_are_written(tokenizer)

    def summands(random: Random) -> tuple[int, int]:
        total = random.randint(22, 99)
        first = random.randint(11, total - 11)
        return first, total - first

    def draw(random: Random) -> TextPair:
        shown = [summands(random) for _ in range(2)]
        examples = "".join(_EXAMPLE.format(a, b, a + b) for a, b in shown)
        clean, corrupt = summands(random), summands(random)
        while sum(clean) // 10 == sum(corrupt) // 10:
            corrupt = summands(random)
        texts = (f"{examples}{_QUESTION.format(*pair)}{space}" for pair in (clean, corrupt))
        after = " " if not space else ""
        words = (f"{after}{str(sum(pair))[:n_digits]}" for pair in (clean, corrupt))
        return TextPair(*texts, *words)

    return draw


def _how_sums_are_written(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """What stands between the text and the sum's first token, and how many digits that has."""
    without, spaced, one, both = encode(tokenizer, ["52 is", "52 is ", "52 is 8", "52 is 86"])
    if both.ids[:-1] == without.ids:
        return "", 2
    if both.ids[:-1] == spaced.ids:
        return " ", 2
    if one.ids[:-1] == spaced.ids and both.ids[:-1] == one.ids:
        return " ", 1
    tokens = " ".join(tokenizer.convert_ids_to_tokens(both.ids))
    raise InputError(
        f"The task 'addition' needs a tokenizer that writes numbers of two digits, or each digit, "
        f"as one token; this one writes '52 is 86' as {tokens!r}."
    )


TASK = Task(
    name="addition",
    says="What is the sum of two numbers of two digits?",
    source="arithmetic, as in Stolfo et al. 2023, arXiv 2305.15054",
    example="34 plus 52 is 86, 21 plus 12 is 33, 43 plus 25 is → 68, or its first digit",
    drawer=_drawer,
    words={},
    needs={},
    space=False,
)
