"""The commands together: from arguments to one that is run."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from tl_entity.cli import finetune, models, plan, study, train
from tl_entity.cli.parser import Commands, OneLineParser, parse_known
from tl_entity.cli.terminal import PROGRAM
from tl_entity.versions import check_transformer_lens

_EXAMPLES = f"""\
examples:
{study.EXAMPLES}
{finetune.EXAMPLES}
  {PROGRAM} plan --base models/llama
      how long each step will take, and how much memory
  {PROGRAM} reproduce --help
      every option; each command has a page of its own

a task of your own:
{study.STUDY_EXAMPLES}
  From Python, all methods work on prompts in which words are marked (marked_pairs).
  notebooks/05_your_own_task.ipynb and docs/howto/own_task.md have the whole way.
"""


def parser() -> tuple[OneLineParser, "Commands[OneLineParser]"]:
    """The parser of all commands, and they themselves."""
    found = OneLineParser(
        prog=PROGRAM,
        description="Does a fine-tuned model use the same mechanism as before, only better?",
        epilog=_EXAMPLES,
    )
    found.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = found.add_subparsers(
        title="commands", metavar="COMMAND", required=True, dest="command"
    )
    for command in (study, train, finetune, models, plan):
        command.add(commands)
    return found, commands


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that these arguments give, or the process's own."""
    return parse_known(*parser(), sys.argv[1:] if arguments is None else list(arguments))


def run(options: argparse.Namespace) -> int:
    """Run the command that was chosen."""
    if options.command != "models":  # which needs nothing of it
        check_transformer_lens()
    options.run(options)
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("tl_entity")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
