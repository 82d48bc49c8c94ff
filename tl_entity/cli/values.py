"""Values on the command line, from text."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tl_entity.errors import InputError
from tl_entity.reading import parse_json


def whole_number(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Reads a whole number."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number") from None
        if least is not None and number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {number}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {number}")
        return number

    return read


def number(text: str) -> float:
    """Reads a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number") from None


def names(text: str) -> tuple[str, ...]:
    """Reads names with commas between them."""
    return tuple(filter(None, text.split(",")))


def numbers(text: str) -> tuple[float, ...]:
    """Reads numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 0.01,0.03") from None


def sizes(count: int) -> Callable[[str], tuple[int, ...]]:
    """Reads so many sizes."""

    def read(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in text.split(","))
        except ValueError:
            found = ()
        if len(found) != count or min(found) < 1:
            example = ",".join(("4", "2", "3", "2")[:count])
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {count} positive whole numbers such as {example}"
            )
        return found

    return read


def shares(text: str) -> dict[str, float]:
    """Reads names with shares, such as `lookup=2,stories=1`; a name alone has share 1."""
    found: dict[str, float] = {}
    for part in text.split(","):
        kind, sign, share = part.partition("=")
        if kind in found:
            raise argparse.ArgumentTypeError(f"{kind!r} is there twice")
        found[kind] = number(share) if sign else 1.0
    return found


def json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object of numbers and names."""
    try:
        content = parse_json(text, "this")
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {error}") from None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a JSON object")
    for name, value in content.items():
        if not isinstance(value, int | float | str):
            raise argparse.ArgumentTypeError(f"{name} is neither a number nor a name")
    return content


def model(text: str) -> str:
    """Reads a model's name or place, or an adapter's."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name stands for no model")
    return text


def folder(text: str) -> Path:
    """Reads the name of a folder to write to."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name is no folder; the current one is .")
    if "\0" in text or not _is_text(text):
        raise argparse.ArgumentTypeError(f"{text!a} holds characters that no text has")
    return Path(text)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
