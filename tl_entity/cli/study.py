"""`reproduce`, a command for each of its experiments, and `study`, the same of any task."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from tl_entity.cli.options import Option, add_options, given
from tl_entity.cli.parser import Commands, OneLineParser
from tl_entity.cli.shared import (
    SPECIAL,
    add_gguf,
    add_loudness,
    add_out,
    check_early,
    name_of_base,
)
from tl_entity.cli.terminal import bar, note, quieten, say, unheard
from tl_entity.cli.values import json_object, model, names, numbers
from tl_entity.study.settings import GROUPS, Settings, experiments_for
from tl_entity.study.task_settings import TaskSettings

METHODS = {
    "discover": "find the circuits, and nothing else",
    "mechanism": "the fewest nodes that alone answer as the model does; needs no circuits",
    "faithfulness": "how much of the accuracy the circuit has alone, beside random circuits",
    "completeness": "the circuit and the model without the same heads",
    "minimality": "what the circuit loses with each of its heads",
    "attention": "what the circuit's heads attend to",
    "dcm": "which heads of each group carry what, by learned masks",
    "information": "what each group carries: DCM, then activation patching",
    "knockout": "where information passes between tokens, by attention knockout",
    "cmap": "heads of one model in the other, both ways",
    "comparison": "the two circuits compared",
    "gain": "which weights bring what fine-tuning gained; needs no circuits",
}
"""Commands that do one experiment of `reproduce`, after what it rests on."""

_CIRCUITS_FIRST = "Accuracy and circuits come first, unless the output folder has them."

_BEFORE: Mapping[str, str] = dict.fromkeys(
    ["mechanism", "gain"], "Accuracy comes first, unless the output folder has it."
)

EXAMPLES = """\
  tl-entity reproduce
      the pair of models that ships; minutes on two cores; report in results/report.html
  tl-entity reproduce --base models/llama --tuned models/llama-tuned --prompts 100 --out study
      folders with config.json, safetensors and a tokenizer
  tl-entity reproduce --base models/llama.gguf --tuned none --sizes 40,7,20,5
      one model alone, from a GGUF file, with the group sizes of the paper
  tl-entity reproduce --base models/llama --tuned-adapter my-lora --out study
      did a LoRA adapter change the mechanism? The fine-tune is the base with the adapter merged"""

STUDY_EXAMPLES = """\
  tl-entity study --task capitals --base models/llama --tuned models/llama-tuned --out capitals
      a task that ships, without groups
  tl-entity study --task pairs.jsonl --recipe recipe.json --base models/llama --tuned none
      your own marked texts, with groups of your own"""

_ONLY = "only these experiments, or those behind these figures or tables (base_knockout, masks), "

_GROUPS = {
    "models": ("base", "base_adapter", "tuned", "tuned_adapter", "control", "control_adapter"),
    "prompts": ("prompts", "pairs", "boxes", "all_pairs", "seed"),
    "circuits": ("sizes", "receiver_sizes", "random_circuits", "ablation", "ceiling"),
    "mechanism": ("mechanism_prompts", "target", "agreement", "gate_training", "edges"),
    "gain": ("gain_prompts",),
    "what heads carry": ("mask_pairs", "sparsities", "mask_seeds", "draws"),
    "how it is computed": (
        "engine",
        "batch_size",
        "memory",
        "dtype",
        "matmul_precision",
        "device",
    ),
    "output": ("png",),
}

_SPECIAL = SPECIAL | {
    "tuned": Option(
        metavar="MODEL",
        read=model,
        help="its fine-tune, given likewise; none to study the base alone (default: default-tuned, "
        "or with --tuned-adapter the base)",
    ),
    "control": Option(
        metavar="MODEL",
        read=model,
        help="a third model, given likewise, whose heads the base gets as a control for those of "
        "its fine-tune (CMAP; default: none, or with --control-adapter the base)",
    ),
    **{f"{role}_adapter": Option(metavar="ADAPTER", read=model) for role in ("base", "tuned")},
    "control_adapter": Option(metavar="ADAPTER", read=model),
    "gate_training": Option(
        metavar="JSON",
        read=json_object,
        help="how the mechanism's gates are trained, where not as usual: fields of GateTraining, "
        'such as \'{"steps": 12, "precision": "bfloat16"}\'',
    ),
    "sparsities": Option(flag="sparsity", metavar="X,...", read=numbers),
    "task": Option(metavar="TASK"),
    "recipe": Option(metavar="FILE"),
    "knowing": Option(
        metavar="NAMES",
        read=names,
        help="names of the file's marks that depend on what is asked (default: none)",
    ),
    "only": Option(
        metavar="NAMES",
        read=names,
        help=f"{_ONLY}beside accuracy and discovery, separated by commas: "
        + ", ".join(name for name in METHODS if name != "discover"),
    ),
    "png": Option(flag="no_png", help="draw no PNG figures, only the HTML ones"),
}


def add(commands: "Commands[OneLineParser]") -> None:
    """Add the commands."""
    whole = commands.add_parser(
        "reproduce",
        help="every experiment of the paper on a base model and its fine-tune",
        description="Measures both models' accuracy, finds the circuit of each by path patching, "
        "tests it, sees what its heads carry, and compares the two. Finished steps are kept in the "
        "output folder, so that the same command goes on where it was stopped.",
        epilog=f"examples:\n{EXAMPLES}\n",
        usage="%(prog)s [options]",
    )
    _add_options(whole, {**_GROUPS, "output": ("only", "png")})
    _add_study(commands)
    for name, what in METHODS.items():
        single = commands.add_parser(
            name,
            help=what,
            description=f"{what.capitalize()}. {_BEFORE.get(name, _CIRCUITS_FIRST)}",
            usage="%(prog)s [options]",
        )
        _add_options(single, _GROUPS)
        single.set_defaults(only=() if name == "discover" else (name,))


def _add_study(commands: "Commands[OneLineParser]") -> None:
    command = commands.add_parser(
        "study",
        help="the same of another task: one that ships, or a file of your own",
        description="Studies a base model and its fine-tune on a task that ships, or on a file of "
        "marked texts. With a recipe it finds circuits of groups and tests them, as reproduce "
        "does; without one it does what needs no groups. Finished steps are kept in the output "
        "folder.",
        epilog=f"examples:\n{STUDY_EXAMPLES}\n",
        usage="%(prog)s --task TASK [options]",
    )
    groups = {"task": ("task", "recipe", "knowing", "joined"), **_GROUPS}
    _add_options(command, {**groups, "output": ("only", "png")}, TaskSettings)


def _add_options(
    command: OneLineParser, groups: Mapping[str, Sequence[str]], settings: type = Settings
) -> None:
    add_options(command, settings, groups, _SPECIAL)
    add_gguf(command, "models")
    add_out(command, "folder for the report and all else", "results")
    command.group("output").add_argument(
        "--wait",
        action="store_true",
        help="wait for another run that works in the folder, instead of giving up",
    )
    command.group("output").add_argument(
        "--json", action="store_true", help="print all results as JSON, as results.json has them"
    )
    add_loudness(command)
    # None: it depends on the adapters.
    command.set_defaults(run=_run, tuned=None)


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that these options mean.

    Raises:
        InputError: if they make no sense.
    """
    base = name_of_base(options)
    tuned = options.tuned or (base if options.tuned_adapter else "default-tuned")
    by_name = options.command in ("reproduce", "study") and options.only is not None
    kind = TaskSettings if options.command == "study" else Settings
    found: dict[str, Any] = given(kind, options) | {
        "base": base,
        "tuned": None if tuned == "none" else tuned,
        "control": options.control or (base if options.control_adapter else None),
        "sizes": options.sizes and dict(zip(GROUPS, options.sizes, strict=True)),
        "receiver_sizes": options.receiver_sizes
        and dict(zip(GROUPS[:-1], options.receiver_sizes, strict=True)),
        # A method's own command may ask for nothing more than the circuits.
        "only": experiments_for(options.only or ()) if options.only or by_name else options.only,
    }
    return kind(**found)


def _run(options: argparse.Namespace) -> None:
    settings = settings_of(options)
    if isinstance(settings, TaskSettings):
        settings.check_files()
    check_early(
        models=tuple(settings.sources.values()),
        adapters=tuple(settings.adapters.values()),
        out=options.out,
        device=settings.device,
    )
    if not options.verbose:
        quieten()
    from tl_entity.exact.precision import float32_matmul_precision
    from tl_entity.ranks import is_first, process_group
    from tl_entity.study.experiments import silent
    from tl_entity.study.report import summary
    from tl_entity.study.reproduce import reproduce
    from tl_entity.study.store import REPORT, to_json

    with process_group(), float32_matmul_precision(settings.matmul_precision):
        quiet = options.quiet or not is_first()
        results = reproduce(
            settings,
            options.out,
            progress=silent if quiet else bar,
            say=unheard if quiet else note,
            join=True,
            wait=options.wait,
            log=note if options.verbose and is_first() else unheard,
        )
        if is_first() and options.json:
            say(to_json(results).rstrip())
        elif is_first():
            for line in summary(results):
                say(line)
            say(f"report: {options.out / REPORT}")
