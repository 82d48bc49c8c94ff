"""Greater than: a war ends after it began (Hanna et al. 2023, arXiv 2305.00586).

`The war lasted from the year 1732 to the year 17` is followed by a number above 32. The answer lies
as far above the start as the foil lies below it, so what counts is whether the answer beats the
foil; that it is the most likely number is not to be expected. The corrupt text begins in the year
01, as in the paper, where both are right.

Tokenizers that write every digit by itself are asked for the next digit, and the start's first
digit, `start.first`, is what it is compared with.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.tasks.encode import encode
from tl_entity.tasks.shipped.task import Task, TextPair, Words

_FORM = "The {event} lasted from the year {century}{start} to the year {century}"

_WORDS = {
    "event": [
        (event,)
        for event in (
            "war conflict siege reign empire revolution struggle campaign project mission career "
            "journey marriage dispute crisis trial"
        ).split()
    ],
}


def _drawer(tokenizer: PreTrainedTokenizerBase, words: Words) -> Callable[[Random], TextPair]:
    n_digits = _digits_of_the_answer(tokenizer)
    events = list(words["event"])

    def draw(random: Random) -> TextPair:
        (event,) = random.choice(events)
        century, tens, ones = random.randint(11, 17), random.randint(2, 7), random.randint(2, 9)
        start = f"{tens}{ones}"
        away = random.randint(1, min(tens, 9 - tens))
        if n_digits == 1:
            answer, foil = str(tens + away), str(tens - away)
        else:
            answer, foil = f"{tens + away}{ones}", f"{tens - away}{ones}"
        clean, corrupt = (
            _FORM.format(event=f"[[event|{event}]]", century=century, start=f"[[start|{years}]]")
            for years in (start, "01")
        )
        return TextPair(clean, corrupt, answer, foil)

    return draw


def _digits_of_the_answer(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many digits of a year follow its century as one token."""
    century, *years = encode(tokenizer, ["the year 17", "the year 174", "the year 1745"])
    for n_digits in (2, 1):
        if years[n_digits - 1].ids[:-1] == century.ids and len(years[1].ids) == (
            len(century.ids) + 3 - n_digits
        ):
            return n_digits
    tokens = " ".join(tokenizer.convert_ids_to_tokens(years[1].ids))
    raise InputError(
        f"The task 'years' needs a tokenizer that cuts a year behind its century; this one writes "
        f"the year 1745 as {tokens!r}."
    )


TASK = Task(
    name="years",
    says="In which year does something end that began in a given one?",
    source="Hanna et al. 2023, How does GPT-2 compute greater-than?, arXiv 2305.00586",
    example="The war lasted from the year 1732 to the year 17 → a number above 32, not one below",
    drawer=_drawer,
    words=_WORDS,
    needs={"event": 1},
    space=False,
)
