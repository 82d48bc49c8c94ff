"""`train-default-pair`: the pair that ships, from nothing."""

import argparse

from tl_entity.cli.parser import Commands, OneLineParser
from tl_entity.cli.shared import add_out, check_early
from tl_entity.cli.terminal import quieten, say
from tl_entity.cli.values import whole_number


def add(commands: "Commands[OneLineParser]") -> None:
    """Add the command."""
    command = commands.add_parser(
        "train-default-pair",
        help="train the pair of models that ships once more",
        description="Trains the tiny base model, with its planted circuit, and its fine-tune.",
    )
    add_out(command, "folder for both checkpoints")
    command.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="(default: 0)"
    )
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    check_early(models=(), out=options.out, device=None)
    quieten()
    from tl_entity.training.pair import train_default_pair

    train_default_pair(options.out, seed=options.seed)
    say(f"The pair is in {options.out}.")
