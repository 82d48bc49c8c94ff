"""Reading text and JSON that somebody else wrote. Needs no torch.

Whatever a file holds, what comes of it is plain data of bounded size and depth, or one sentence
that names the file and the place in it.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from tl_entity.errors import InputError

MOST_BYTES = 2**29
"""Larger files are not read as text."""

MOST_DEPTH = 100
"""Lists and objects within one another. No file of ours or of a model's has a tenth of it."""

MOST_DIGITS = 400
"""Of one number; a float64 has at most 309 before its point."""


def read_text(path: str | Path, *, what: str = "file") -> str:
    """A file's text; a byte order mark at its beginning is left out.

    Args:
        path: the file.
        what: it is meant to be, such as "circuit file".

    Raises:
        InputError: if it is not there, is no plain file, is too large, or is no UTF-8 text.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path}: no such {what}.")
        if path.is_dir():
            raise InputError(f"{path}: no such {what}; it is a folder.")
        # A pipe or device would keep the reader waiting for ever.
        if not path.is_file():
            raise InputError(f"{path} is no plain file.")
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has more than {MOST_BYTES >> 20} MiB, which is no text here.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a UTF-8 text file: byte {error.start} is none.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)!r:.200} can't be read: {reason}.") from None


def read_json(
    path: str | Path, *, what: str = "file", holds: str = "a JSON object"
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        what: it is meant to be, such as "circuit file".
        holds: what it must hold, for messages.

    Raises:
        InputError: if it can't be read, is no JSON within the bounds, or holds anything else.
    """
    content = parse_json(read_text(path, what=what), str(path), kind="a JSON file")
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold {holds}, not {described(content)}.")
    return content


def parse_json(text: str, place: str, *, kind: str = "JSON") -> Any:
    """What a JSON text says: numbers are finite, and texts can be written again.

    Args:
        text: the JSON.
        place: names where it stands in messages, such as the file.
        kind: what it is meant to be, for messages.

    Raises:
        InputError: if it is no JSON, or goes beyond the bounds.
    """
    refusal = f"{place} is not {kind} that can be read"
    try:
        content = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        where = f"{line}column {error.colno}"
        raise InputError(f"{place} is not {kind}: {error.msg} ({where}).") from None
    except RecursionError:
        raise InputError(f"{refusal}: it is nested too deep.") from None
    except ValueError as error:
        raise InputError(f"{refusal}: {error}.") from None
    _check_bounds(content, refusal, has_surrogates="\\ud" in text or "\\uD" in text)
    return content


def described(content: object) -> str:
    """A piece of JSON in a few words, for messages."""
    if isinstance(content, dict):
        return f"an object of {len(content)} entries"
    if isinstance(content, list):
        return f"a list of {len(content)}"
    text = json.dumps(content)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _integer(digits: str) -> int:
    _check_digits(digits)
    return int(digits)


def _float(digits: str) -> float:
    _check_digits(digits)
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits:.40} is too large")
    return number


def _check_digits(digits: str) -> None:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check_bounds(content: object, refusal: str, *, has_surrogates: bool) -> None:
    level: list[object] = [content]
    for _ in range(MOST_DEPTH):
        below: list[object] = []
        for part in level:
            if isinstance(part, dict):
                below += part.values()
                if has_surrogates:
                    below += part.keys()
            elif isinstance(part, list):
                below += part
            elif has_surrogates and isinstance(part, str):
                try:
                    part.encode()
                except UnicodeEncodeError:
                    raise InputError(f"{refusal}: a text has half a character in it.") from None
        if not below:
            return
        level = below
    raise InputError(f"{refusal}: it is nested too deep.")
