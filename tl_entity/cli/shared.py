"""Options that several commands have, and checks of them that need nothing heavy."""

import argparse
from pathlib import Path

from tl_entity.cli.options import Option
from tl_entity.cli.parser import OneLineParser
from tl_entity.cli.values import folder, model, sizes
from tl_entity.devices import check_device
from tl_entity.models.registry import check_model, join_gguf
from tl_entity.output import check_writable

MODEL = (
    "a name (tl-entity models lists them), a folder, a GGUF file, or a hub id (owner/name, or "
    "owner/name/file.gguf)"
)
"""What stands for a model, wherever one is asked for."""

SPECIAL = {
    "base": Option(
        metavar="MODEL", read=model, help=f"base model: {MODEL} (default: default-base)"
    ),
    "sizes": Option(metavar="A,B,C,D", read=sizes(4)),
    "receiver_sizes": Option(metavar="A,B,C", read=sizes(3)),
    "memory": Option(metavar="GIB"),
    "device": Option(metavar="DEVICE"),
}
"""Options of settings that several commands have."""

GGUF = "a GGUF file in the folder or hub repository that --base names"


def add_gguf(parser: OneLineParser, heading: str, *also: str) -> None:
    """`--gguf`, beside `--base`."""
    parser.group(heading).add_argument(
        "--gguf", *also, dest="gguf", metavar="FILE", type=model, help=GGUF
    )


def add_out(parser: OneLineParser, help: str, default: str | None = None) -> None:
    """`--out`."""
    usual = f" (default: {default})" if default else ""
    parser.group("output").add_argument(
        "--out",
        type=folder,
        required=default is None,
        default=default and Path(default),
        metavar="FOLDER",
        help=help + usual,
    )


def add_loudness(parser: OneLineParser) -> None:
    """`--quiet` or `--verbose`."""
    either = parser.group("output").add_mutually_exclusive_group()
    either.add_argument(
        "-q", "--quiet", action="store_true", help="no progress bars and notes, only the results"
    )
    either.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also say how long each step took or that it was found finished, and let libraries "
        "warn",
    )


def name_of_base(options: argparse.Namespace) -> str:
    """The one name that stands for the base, its GGUF file included."""
    return options.base if options.gguf is None else join_gguf(options.base, options.gguf)


def check_early(
    *,
    models: tuple[str | None, ...],
    adapters: tuple[str | None, ...] = (),
    out: Path | None = None,
    device: str | None,
) -> None:
    """Refuse what can be refused before anything heavy is imported.

    Raises:
        InputError: if a model or adapter can't be meant by its name, nothing can be written to the
            folder, or there is no such device.
    """
    if out is not None:
        check_writable(out)
    for name in filter(None, models):
        check_model(name)
    for name in filter(None, adapters):
        check_model(name, adapter=True)
    check_device(device)
