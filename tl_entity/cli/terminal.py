"""What the program says: results on standard output, all else on standard error."""

import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tl_entity.study.experiments import Count

PROGRAM = "tl-entity"


def say(line: str) -> None:
    """A result."""
    _write(sys.stdout, f"{line}\n")


def note(line: str) -> None:
    """News, or what is wrong."""
    _write(sys.stderr, f"{PROGRAM}: {line}\n")


def unheard(line: str) -> None:
    """Nothing."""


@contextmanager
def bar(what: str, total: int) -> "Generator[Count, None, None]":
    """A progress bar."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=f"{what:<24}",
        unit="run",
        file=sys.stderr,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        "{postfix}",
    ) as shown:

        def count(runs: int, note: str = "", /) -> None:
            if note:
                shown.set_postfix_str(note, refresh=False)
            shown.update(runs)

        yield count


def quieten() -> None:
    """Keep libraries from talking over the progress bars."""
    # Read when transformers and huggingface_hub are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a name that is no text, or a terminal of few characters
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
