"""`tl-entity`: one file a command. Imports nothing heavy before a command has been understood."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_entity.cli.study import METHODS

__all__ = ["METHODS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those after the program's name; the process's own if left out.

    Returns:
        The exit code: 0; 1 for a fault of ours, or too little memory; 2 for input that cannot be
        used; 130 if interrupted, 143 if terminated.
    """
    # An interrupt is heard from here on, so the rest is imported after it.
    from tl_entity.cli.ending import Signals, explain

    with Signals() as signals:
        options = None
        try:
            from tl_entity.cli.program import parse, run

            options = parse(arguments)
            return options if isinstance(options, int) else run(options)
        except BaseException as error:
            return explain(error, signals, getattr(options, "out", None))


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        from tl_entity.cli import study

        return study.METHODS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
