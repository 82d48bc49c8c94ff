"""How the program ends: by a signal, for want of memory, by bad input, or by a fault of ours."""

import errno
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from tl_entity.cli.terminal import PROGRAM, note
from tl_entity.errors import InputError

FAULT, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes; one that a signal ends is 128 and the signal's number."""

_LINE_ENDS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to map segment",
)
"""What torch and the operating system say, in errors of several kinds."""


class Signals:
    """While it is entered, SIGINT and SIGTERM end the work in the same way; a second one at once.

    Attributes:
        received: the signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Python lets no other thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        raise KeyboardInterrupt


def explain(error: BaseException, signals: Signals, out: Path | None) -> int:
    """Say in one line why the program ends; for what nobody foresaw, with the traceback in a file.

    Args:
        error: what was raised.
        signals: those that came; an import that one stops may raise anything.
        out: the output folder, if the command has one.

    Returns:
        The exit code.
    """
    if signals.received is not None or isinstance(error, KeyboardInterrupt):
        note("interrupted. Finished steps are kept: the same command goes on from there.")
        return INTERRUPTED if signals.received is None else 128 + signals.received
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BAD_INPUT
    if isinstance(error, InputError):
        note(one_line(error))
        return BAD_INPUT
    if _is_out_of_memory(error):
        note(
            "out of memory. Finished steps are kept. What takes less: --batch-size 1, "
            "--memory with a smaller number, --dtype bfloat16, fewer --prompts or --boxes, a "
            f"smaller model; tl-entity plan says what a run needs. {_where_traceback(error, out)}"
        )
        return FAULT
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has had enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        note(one_line(f"{place}{error.strerror or error}."))
        return BAD_INPUT
    note(
        f"this is a fault of {PROGRAM}, not of its input: {one_line(_described(error))}. "
        f"{_where_traceback(error, out)} Please report it with that file. Finished steps are kept."
    )
    return FAULT


def one_line(text: object) -> str:
    """A text without line ends and other control characters, which names of files may hold."""
    return _LINE_ENDS.sub(" ", str(text)).strip()


def _described(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".rstrip(".: ")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    # CUDA's is a RuntimeError of its own; the CPU's is a plain one; libraries may not fit either.
    return isinstance(error, RuntimeError | ImportError) and any(
        words in said for words in _OUT_OF_MEMORY
    )


def _where_traceback(error: BaseException, out: Path | None) -> str:
    """Write the traceback to a new file, in the output folder if that is there; where it is."""
    try:
        handle, name = tempfile.mkstemp(
            prefix=f"{PROGRAM}-error-",
            suffix=".txt",
            dir=out if out is not None and out.is_dir() else None,
        )
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except (OSError, ValueError):
        return "The traceback could not be written."
    return f"The traceback is in {name}."
