"""What a person did that cannot be done, said in one sentence."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """The input cannot be used: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2.
    """


class ArgumentError(InputError, TypeError):
    """An argument is of another type than it must be: the message says which, what it is, and what
    is wanted."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?` if a known name is close to the one given, or else a full stop: the end
    of a sentence that says there is no such name."""
    close = get_close_matches(given, list(known), n=2, cutoff=0.65)
    return f"; did you mean {' or '.join(close)}?" if close else "."
