"""`tl-entity`: commands, progress, and errors as one line. Imports torch only inside a command."""

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tl_entity.errors import InputError
from tl_entity.versions import check_transformer_lens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tl_entity.study.experiments import Count

    Commands = argparse._SubParsersAction["_OneLineParser"]  # pyright: ignore[reportPrivateUsage]

PROGRAM = "tl-entity"
BAD_INPUT, INTERRUPTED = 2, 130

_EXAMPLES = """\
examples:
  tl-entity reproduce
      the pair of models that ships; minutes on two cores; report in results/report.html
  tl-entity reproduce --base models/llama --tuned models/llama-tuned --prompts 100 --out study
      folders with config.json, safetensors and a tokenizer
  tl-entity reproduce --base models/llama --tuned none --sizes 40,7,20,5 --receiver-sizes 20,5,10
      one model alone, with the group sizes of the paper
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those after the program's name; the process's own if left out.

    Returns:
        The exit code: 0; 2 for input that cannot be used; 130 if interrupted.
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why, or has shown its help
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        if options.command != "models":  # which needs nothing of it
            check_transformer_lens()
        options.run(options)
    except InputError as error:
        return _complain(str(error), BAD_INPUT)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _complain(f"{place}{error.strerror or error}.", BAD_INPUT)
    except KeyboardInterrupt:
        return _complain(
            "interrupted. Finished steps are kept: the same command goes on from there.",
            INTERRUPTED,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog=PROGRAM,
        description="Does a fine-tuned model use the same mechanism as before, only better?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, dest="command"
    )
    _add_reproduce(commands)
    _add_train(commands)
    _add_finetune(commands)
    _add_models(commands)
    _add_plan(commands)
    return parser


METHODS = {
    "discover": "find the circuits, and nothing else",
    "faithfulness": "how much of the accuracy the circuit has alone, beside random circuits",
    "completeness": "the circuit and the model without the same heads",
    "minimality": "what the circuit loses with each of its heads",
    "attention": "what the circuit's heads attend to",
    "dcm": "which heads of each group carry what, by learned masks",
    "information": "what each group carries: DCM, then activation patching",
    "knockout": "where information passes between tokens, by attention knockout",
    "cmap": "heads of one model in the other, both ways",
    "comparison": "the two circuits compared",
}
"""Commands that do one experiment of `reproduce`, after the circuits that it rests on."""


def _add_reproduce(commands: "Commands") -> None:
    command = commands.add_parser(
        "reproduce",
        help="every experiment of the paper on a base model and its fine-tune",
        description="Measures both models' accuracy, finds the circuit of each by path patching, "
        "tests it, sees what its heads carry, and compares the two. Finished steps are kept in the "
        "output folder, so that the same command goes on where it was stopped.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_study_options(command)
    command.add_argument(
        "--only",
        type=lambda text: tuple(filter(None, text.split(","))),
        metavar="NAMES",
        help="only these experiments, or those behind these figures or tables (base_knockout, "
        "masks), beside accuracy and discovery, separated by commas: "
        + ", ".join(name for name in METHODS if name != "discover"),
    )
    for name, what in METHODS.items():
        single = commands.add_parser(
            name,
            help=what,
            description=f"{what.capitalize()}. Accuracy and circuits come first, unless the output "
            "folder has them.",
        )
        _add_study_options(single)
        single.set_defaults(only=() if name == "discover" else (name,))


def _add_study_options(command: "_OneLineParser") -> None:
    model = "a name (default-base, default-tuned), a folder, or a hub id"
    add = command.add_argument
    add("--base", default="default-base", metavar="MODEL", help=f"base model: {model}")
    add(
        "--tuned",
        metavar="MODEL",
        help="its fine-tune, given likewise; none to study the base alone (default: default-tuned, "
        "or with --tuned-adapter the base)",
    )
    add(
        "--control",
        metavar="MODEL",
        help="a third model, given likewise, whose heads the base gets as a control for those of "
        "its fine-tune (CMAP; default: none, or with --control-adapter the base)",
    )
    for role in ("base", "tuned", "control"):
        add(
            f"--{role}-adapter",
            metavar="ADAPTER",
            help=f"folder or hub id of a LoRA adapter to merge into the {role} model",
        )
    add(
        "--prompts",
        type=_whole_number(2),
        default=200,
        metavar="N",
        help="prompts an accuracy (default: 200)",
    )
    add(
        "--pairs",
        type=_whole_number(2),
        metavar="N",
        help="pairs of prompts that each circuit is found from (default: as many as --prompts)",
    )
    add(
        "--boxes",
        type=_whole_number(2),
        default=7,
        metavar="N",
        help="boxes in a prompt (default: 7)",
    )
    add(
        "--sizes",
        type=_sizes(4),
        metavar="A,B,C,D",
        help="heads kept in each of the four groups (default: as many as were planted, "
        "or else the share that they have in the paper)",
    )
    add(
        "--receiver-sizes",
        type=_sizes(3),
        metavar="A,B,C",
        help="how many of a group's heads the next stage patches into (default: all that were "
        "planted, or else the paper's share of the group)",
    )
    add(
        "--random-circuits",
        type=_whole_number(0),
        default=10,
        metavar="N",
        help="how many random circuits to compare with (default: 10)",
    )
    add(
        "--ablation",
        choices=("pooled", "resample", "index", "zero"),
        default="pooled",
        help="what ablated heads put out: the mean over all tokens of the same role (pooled, the "
        "default), another prompt's output at such a token (resample), the mean at the token's "
        "index (index, the paper's, which is always shown beside), or nothing (zero)",
    )
    add(
        "--mask-pairs",
        type=_whole_number(4),
        default=400,
        metavar="N",
        help="pairs of prompts that DCM learns a mask from, half of them to train (default: 400)",
    )
    add(
        "--sparsity",
        type=_prices,
        default=(0.01,),
        metavar="X,...",
        help="prices of a head that DCM tries, each by itself; the best mask on validation pairs "
        "is used (default: 0.01)",
    )
    add(
        "--mask-seeds",
        type=_whole_number(1),
        default=1,
        metavar="N",
        help="draws of pairs that DCM learns a mask from, each by itself (default: 1)",
    )
    add(
        "--draws",
        type=_whole_number(1),
        default=5,
        metavar="N",
        help="draws of the prompts that heads are patched on (default: 5)",
    )
    add(
        "--ceiling",
        action="store_true",
        help="find the base's circuit once more from other pairs, to set what two circuits share "
        "beside what one shares with itself",
    )
    add(
        "--all-pairs",
        action="store_true",
        help="also find circuits from prompts that the model answers wrong",
    )
    add(
        "--seed",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="all random choices follow from it (default: 0)",
    )
    add(
        "--engine",
        choices=["exact", "hooks"],
        default="exact",
        help="path patching: only what can change (exact), or a full run a head (hooks)",
    )
    add(
        "--batch-size",
        type=_whole_number(1),
        metavar="N",
        help="prompts run together (default: what memory allows)",
    )
    _add_memory(add)
    add(
        "--dtype",
        choices=["float32", "float64", "float16", "bfloat16"],
        default="float32",
        help="of weights and activations (default: float32)",
    )
    add(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="of float32 matrix products, where the hardware has faster ones: high is TF32, medium "
        "bfloat16 (default: highest)",
    )
    add("--device", metavar="NAME", help="such as cpu or cuda (default: the best there is)")
    add("--no-png", action="store_true", help="draw no PNG figures, only the HTML ones")
    add("--json", action="store_true", help="print all results as JSON, as results.json has them")
    _add_loudness(command)
    add(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="folder for the report and all else (default: results)",
    )
    command.set_defaults(run=_reproduce)


def _add_memory(add: "Callable[..., object]") -> None:
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="what intermediate results may take (default: a quarter of the device's memory, on a "
        "CPU at most 2)",
    )


def _add_loudness(command: "_OneLineParser") -> None:
    either = command.add_mutually_exclusive_group()
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


def _add_train(commands: "Commands") -> None:
    command = commands.add_parser(
        "train-default-pair",
        help="train the pair of models that ships once more",
        description="Trains the tiny base model, with its planted circuit, and its fine-tune.",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for both checkpoints"
    )
    command.add_argument(
        "--seed", type=_whole_number(0), default=0, metavar="N", help="(default: 0)"
    )
    command.set_defaults(run=_train)


def _add_finetune(commands: "Commands") -> None:
    command = commands.add_parser(
        "finetune",
        help="train a LoRA adapter on look-up and arithmetic, and watch the box task",
        description="Trains a LoRA adapter on texts made here (variable look-up, arithmetic, plain "
        "stories; nothing about boxes) and measures the box task along the way. Adapters are kept "
        "as step-0020/ and so on, figures in finetune.json. The same command goes on where it was "
        "stopped. Needs peft.",
    )
    add = command.add_argument
    add(
        "--base",
        required=True,
        metavar="MODEL",
        help="a name (tl-entity models lists them), a folder, a GGUF file, or a hub id",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for all that is made")
    add("--gguf-file", metavar="NAME", help="a GGUF file in the folder or hub repository")
    add(
        "--base-name",
        metavar="NAME",
        help="what the adapter says it belongs to, such as a hub id (default: as --base; of a path "
        "its last part)",
    )
    add(
        "--mix",
        type=_shares,
        metavar="KIND=SHARE,...",
        help="kinds of text and their shares (default: lookup=1,arithmetic=1,stories=1)",
    )
    numbers = {
        "steps": (1, 80, "optimiser steps"),
        "texts": (1, 8, "texts a step"),
        "rank": (1, 16, "rank of the adapter"),
        "seed": (0, 0, "of the texts and the adapter's first values"),
        "evaluate-every": (1, 20, "steps between two evaluations"),
        "prompts": (1, 100, "box prompts an evaluation"),
        "boxes": (1, 7, "boxes in a prompt"),
        "checkpoint-every": (1, 20, "steps between two adapters that are kept"),
    }
    for name, (least, usual, what) in numbers.items():
        add(
            f"--{name}",
            type=_whole_number(least),
            default=usual,
            metavar="N",
            help=f"{what} (default: {usual})",
        )
    add("--learning-rate", type=float, default=1e-4, metavar="X", help="of AdamW (default: 0.0001)")
    add(
        "--alpha",
        type=float,
        metavar="X",
        help="scale of the adapter times its rank (default: twice the rank)",
    )
    add(
        "--targets",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=("q_proj", "k_proj", "v_proj", "o_proj"),
        metavar="NAMES",
        help="layers that get an adapter (default: q_proj,k_proj,v_proj,o_proj)",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the base's weights (default: float32)",
    )
    add("--device", metavar="NAME", help="such as cpu or cuda (default: the best there is)")
    _add_loudness(command)
    command.set_defaults(run=_finetune)


def _add_models(commands: "Commands") -> None:
    command = commands.add_parser(
        "models",
        help="list the models that have a name here",
        description="Names that stand for a model wherever one is asked for, with its size, the "
        "memory of its weights, licence and source. Any folder or hub id of a Llama, Mistral, "
        "Qwen2 or Qwen3 model does as well.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_models)


def _add_plan(commands: "Commands") -> None:
    command = commands.add_parser(
        "plan",
        help="what a long run will take, before it is started",
        description="Counts, from a model's configuration alone, the operations and the memory of "
        "each step on the exact engine, and the runs that plain hooks would need; then times "
        "matrix products of these shapes for about a second to estimate how long each step takes "
        "on this machine. Where a model's circuit is not known, its heads are taken to be spread "
        "over the upper half of the layers.",
    )
    add = command.add_argument
    add(
        "--model",
        default="default-base",
        metavar="MODEL",
        help="a name, a folder, a GGUF file, or a hub id, of which no weights are fetched "
        "(default: default-base)",
    )
    add(
        "--prompts",
        type=_whole_number(1),
        default=200,
        metavar="N",
        help="prompts, or pairs of them (default: 200)",
    )
    add(
        "--boxes",
        type=_whole_number(1),
        default=7,
        metavar="N",
        help="boxes in a prompt (default: 7)",
    )
    add(
        "--sizes",
        type=_sizes(4),
        metavar="A,B,C,D",
        help="heads in each of the four groups (default: as in reproduce)",
    )
    add(
        "--receiver-sizes",
        type=_sizes(3),
        metavar="A,B,C",
        help="how many of a group's heads the next stage patches into (default: as in reproduce)",
    )
    add(
        "--circuits",
        type=_whole_number(1),
        default=11,
        metavar="N",
        help="how many circuits are evaluated (default: 11, one and ten random ones)",
    )
    add(
        "--dtype",
        choices=["float32", "float64", "float16", "bfloat16"],
        default="float32",
        help="of weights and activations (default: float32)",
    )
    _add_memory(add)
    add("--device", metavar="NAME", help="such as cpu or cuda (default: the best there is)")
    add("--untimed", action="store_true", help="count only, without the calibration")
    add("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_plan)


def _reproduce(options: argparse.Namespace) -> None:
    if not options.verbose:
        _quieten()
    from tl_entity.exact.precision import float32_matmul_precision
    from tl_entity.ranks import is_first, process_group
    from tl_entity.study.experiments import silent
    from tl_entity.study.report import summary
    from tl_entity.study.reproduce import reproduce
    from tl_entity.study.settings import GROUPS, Settings, experiments_for
    from tl_entity.study.store import REPORT, to_json

    by_name = options.command == "reproduce" and options.only is not None
    tuned = options.tuned or (options.base if options.tuned_adapter else "default-tuned")
    settings = Settings(
        base=options.base,
        tuned=None if tuned == "none" else tuned,
        base_adapter=options.base_adapter,
        tuned_adapter=options.tuned_adapter,
        control=options.control or (options.base if options.control_adapter else None),
        control_adapter=options.control_adapter,
        prompts=options.prompts,
        pairs=options.pairs,
        boxes=options.boxes,
        sizes=options.sizes and dict(zip(GROUPS, options.sizes, strict=True)),
        receiver_sizes=options.receiver_sizes
        and dict(zip(GROUPS[:-1], options.receiver_sizes, strict=True)),
        random_circuits=options.random_circuits,
        ablation=options.ablation,
        mask_pairs=options.mask_pairs,
        sparsities=options.sparsity,
        mask_seeds=options.mask_seeds,
        draws=options.draws,
        ceiling=options.ceiling,
        # A method's own command may ask for nothing more than the circuits.
        only=experiments_for(options.only or ()) if options.only or by_name else options.only,
        all_pairs=options.all_pairs,
        seed=options.seed,
        engine=options.engine,
        batch_size=options.batch_size,
        memory=options.memory,
        dtype=options.dtype,
        device=options.device,
        matmul_precision=options.matmul_precision,
        png=not options.no_png,
    )
    with process_group(), float32_matmul_precision(options.matmul_precision):
        quiet = options.quiet or not is_first()
        results = reproduce(
            settings,
            options.out,
            progress=silent if quiet else _bar,
            say=_unheard if quiet else _note,
            join=True,
            log=_note if options.verbose and is_first() else _unheard,
        )
        if is_first() and options.json:
            _say(to_json(results).rstrip())
        elif is_first():
            for line in summary(results):
                _say(line)
            _say(f"report: {options.out / REPORT}")


def _train(options: argparse.Namespace) -> None:
    _quieten()
    from tl_entity.output import check_writable
    from tl_entity.training.pair import train_default_pair

    check_writable(options.out)
    train_default_pair(options.out, seed=options.seed)
    _say(f"The pair is in {options.out}.")


def _finetune(options: argparse.Namespace) -> None:
    if not options.verbose:
        _quieten()
    from tl_entity.training.finetune import finetune
    from tl_entity.training.finetune_settings import FinetuneSettings

    given = {
        name: getattr(options, name)
        for name in FinetuneSettings.__dataclass_fields__
        if getattr(options, name) is not None
    }
    settings = FinetuneSettings(**given)
    with ExitStack() as opened:
        bars: list[Count] = []

        def progress(steps: int, note: str) -> None:
            # The bar opens with the first news, so that a refusal is one line alone.
            if not options.quiet and not bars:
                bars.append(opened.enter_context(_bar("fine-tuning", settings.steps)))
            for bar in bars:
                bar(steps, note)

        found = finetune(
            options.base,
            options.out,
            settings,
            base_name=options.base_name,
            gguf_file=options.gguf_file,
            device=options.device,
            progress=progress,
        )
    for evaluation in found.evaluations:
        _say(str(evaluation))
    _say(f"The adapter is in {found.adapter}.")


def _models(options: argparse.Namespace) -> None:
    from tl_entity.models.registry import REGISTRY, listing

    if options.json:
        import dataclasses
        import json

        _say(json.dumps([dataclasses.asdict(model) for model in REGISTRY], indent=2))
        return
    for line in listing():
        _say(line)


def _plan(options: argparse.Namespace) -> None:
    _quieten()
    import json

    from tl_entity.planning.plan import (
        box_layout,
        entity_tracking_jobs,
        plan,
        read_configuration,
    )
    from tl_entity.study.settings import GROUPS, Settings, planted, resolve_sizes
    from tl_entity.tasks.pairs import discovery_pairs

    cfg, tokenizer = read_configuration(options.model, dtype=options.dtype, device=options.device)
    settings = Settings(
        base=options.model,
        tuned=None,
        prompts=max(2, options.prompts),
        memory=options.memory,
        sizes=options.sizes and dict(zip(GROUPS, options.sizes, strict=True)),
        receiver_sizes=options.receiver_sizes
        and dict(zip(GROUPS[:-1], options.receiver_sizes, strict=True)),
    )
    sizes, receivers = resolve_sizes(settings, cfg.n_layers * cfg.n_heads)
    known = planted(options.model) if options.sizes is options.receiver_sizes is None else None
    jobs = entity_tracking_jobs(
        cfg,
        sizes=sizes,
        receivers=receivers if known is None else {name: known[name] for name in receivers},
        circuits=options.circuits,
    )
    if tokenizer is None:
        pairs = box_layout(options.prompts, n_boxes=options.boxes)
    else:
        pairs = discovery_pairs(tokenizer, options.prompts, n_boxes=options.boxes, seed=0)
    found = plan(cfg, pairs, jobs, memory=settings.memory_bytes, timed=not options.untimed)
    if options.json:
        _say(json.dumps({"model": options.model, **found.to_dict()}, indent=2))
        return
    for line in found.table():
        _say(line)


@contextmanager
def _bar(what: str, total: int) -> "Generator[Count, None, None]":
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=f"{what:<24}",
        unit="run",
        file=sys.stderr,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        "{postfix}",
    ) as bar:

        def count(runs: int, note: str = "", /) -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(runs)

        yield count


def _quieten() -> None:
    """Keep libraries from talking over the progress bars."""
    # Read when transformers and huggingface_hub are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{PROGRAM}: {message} (see {self.prog} --help)\n")


def _whole_number(least: int) -> "Callable[[str], int]":
    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {number}")
        return number

    return read


def _shares(text: str) -> dict[str, float]:
    shares = {}
    for part in text.split(","):
        kind, sign, share = part.partition("=")
        try:
            number = float(share) if sign else 1.0
        except ValueError:
            raise argparse.ArgumentTypeError(f"{share!r} is not a number") from None
        if kind in shares:
            raise argparse.ArgumentTypeError(f"{kind!r} is there twice")
        shares[kind] = number
    return shares


def _prices(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 0.01,0.03") from None


def _sizes(count: int) -> "Callable[[str], tuple[int, ...]]":
    def read(text: str) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count or min(numbers) < 1:
            example = ",".join(("4", "2", "3", "2")[:count])
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {count} positive whole numbers such as {example}"
            )
        return numbers

    return read


def _version() -> str:
    try:
        return importlib.metadata.version("tl_entity")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _note(line: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {line}\n")


def _unheard(line: str) -> None:
    pass


def _complain(sentence: str, code: int) -> int:
    _note(sentence)
    return code
