"""`models`: those that have a name."""

import argparse
import dataclasses
import json

from tl_entity.cli.parser import Commands, OneLineParser
from tl_entity.cli.shared import MODEL
from tl_entity.cli.terminal import say
from tl_entity.models.registry import REGISTRY, listing


def add(commands: "Commands[OneLineParser]") -> None:
    """Add the command."""
    command = commands.add_parser(
        "models",
        help="list the models that have a name here",
        description=f"Wherever a model is asked for, it is given as {MODEL}, of a Llama, Mistral, "
        "Qwen2 or Qwen3 model. Names stand for these, with size, memory of the weights, licence "
        "and source.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.json:
        say(json.dumps([dataclasses.asdict(model) for model in REGISTRY], indent=2))
        return
    for line in listing():
        say(line)
