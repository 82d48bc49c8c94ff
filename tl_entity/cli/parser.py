"""Arguments into options, and what is wrong with them in one line."""

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from tl_entity.cli.terminal import PROGRAM
from tl_entity.errors import did_you_mean

BAD_INPUT = 2


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs and leaves lines that are indented as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line if line.startswith(" ") else textwrap.fill(line, width)
            for line in text.splitlines()
        )


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(**settings)

    def group(self, heading: str) -> Any:
        """The options under this heading of the help."""
        for group in self._action_groups:
            if group.title == heading:
                return group
        return self.add_argument_group(heading)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{PROGRAM}: {message} (see {self.prog} --help)\n")

    def options(self) -> list[str]:
        """All options in their long form."""
        return [text for text in self._option_string_actions if text.startswith("--")]


Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]


def parse_known(
    parser: OneLineParser, commands: "Commands[OneLineParser]", arguments: Sequence[str]
) -> argparse.Namespace:
    """The options that these arguments give.

    Raises:
        SystemExit: if there is no such command or option, or a value can't be read; it has been
            said. Also after help or the version was shown.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in commands.choices:
        known = ", ".join(commands.choices)
        suggestion = did_you_mean(command, commands.choices).rstrip(".")
        parser.error(f"there is no command {command!r}{suggestion or f'; there are {known}'}")
    options, strange = parser.parse_known_args(arguments)
    if strange:
        own: OneLineParser = commands.choices[options.command]
        word = strange[0].partition("=")[0]
        if word.startswith("-"):
            suggestion = did_you_mean(word, own.options()).rstrip(".")
            own.error(f"there is no option {word}{suggestion}")
        own.error(f"{strange[0]!r} belongs to no option")
    return options
