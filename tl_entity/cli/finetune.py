"""`finetune`: a LoRA adapter on skills other than the box task."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tl_entity.cli.options import Option, add_options, given
from tl_entity.cli.parser import Commands, OneLineParser
from tl_entity.cli.shared import MODEL, add_gguf, add_loudness, add_out, check_early
from tl_entity.cli.terminal import bar, quieten, say
from tl_entity.cli.values import model, names, shares
from tl_entity.training.finetune_settings import FinetuneSettings

if TYPE_CHECKING:
    from tl_entity.study.experiments import Count

EXAMPLES = """\
  tl-entity finetune --base models/qwen.gguf --out my-lora
      a LoRA adapter on look-up, arithmetic and stories, the box task measured along the way
  tl-entity reproduce --base models/qwen.gguf --tuned-adapter my-lora/step-0080 --out study
      and what it changed: the base beside the base with that adapter"""

_GROUPS = {
    "texts": ("mix", "texts", "seed"),
    "training": ("steps", "learning_rate", "rank", "alpha", "targets", "checkpoint_every"),
    "watching the box task": ("evaluate_every", "prompts", "boxes"),
    "how it is computed": ("dtype",),
}

_SPECIAL = {
    "mix": Option(metavar="KIND=SHARE,...", read=shares),
    "dtype": Option(choices=("float32", "bfloat16")),
    "targets": Option(metavar="NAMES", read=names),
}


def add(commands: "Commands[OneLineParser]") -> None:
    """Add the command."""
    command = commands.add_parser(
        "finetune",
        help="train a LoRA adapter on look-up and arithmetic, and watch the box task",
        description="Trains a LoRA adapter on texts made here (variable look-up, arithmetic, plain "
        "stories; nothing about boxes) and measures the box task along the way. Adapters are kept "
        "as step-0020/ and so on, figures in finetune.json. The same command goes on where it was "
        "stopped. Needs peft.",
        epilog=f"examples:\n{EXAMPLES}\n",
        usage="%(prog)s --base MODEL --out FOLDER [options]",
    )
    command.group("model").add_argument(
        "--base", required=True, type=model, metavar="MODEL", help=MODEL
    )
    add_gguf(command, "model", "--gguf-file")
    command.group("model").add_argument(
        "--base-name",
        metavar="NAME",
        help="what the adapter says it belongs to, such as a hub id (default: as --base; of a path "
        "its last part)",
    )
    add_options(command, FinetuneSettings, _GROUPS, _SPECIAL)
    command.group("how it is computed").add_argument(
        "--device", metavar="DEVICE", help="such as cpu or cuda (default: the best there is)"
    )
    add_out(command, "folder for all that is made")
    add_loudness(command)
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    settings = FinetuneSettings(**given(FinetuneSettings, options))
    check_early(models=(options.base,), out=options.out, device=options.device)
    if not options.verbose:
        quieten()
    from tl_entity.training.finetune import finetune

    with ExitStack() as opened:
        bars: list[Count] = []

        def progress(steps: int, note: str) -> None:
            # The bar opens with the first news, so that a refusal is one line alone.
            if not options.quiet and not bars:
                bars.append(opened.enter_context(bar("fine-tuning", settings.steps)))
            for shown in bars:
                shown(steps, note)

        found = finetune(
            options.base,
            options.out,
            settings,
            base_name=options.base_name,
            gguf_file=options.gguf,
            device=options.device,
            progress=progress,
        )
    for evaluation in found.evaluations:
        say(str(evaluation))
    say(f"The adapter is in {found.adapter}.")
