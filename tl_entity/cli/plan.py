"""`plan`: what a run will take."""

import argparse
import json

from tl_entity.cli.options import Option, add_options
from tl_entity.cli.parser import Commands, OneLineParser
from tl_entity.cli.shared import SPECIAL, add_gguf, check_early, name_of_base
from tl_entity.cli.terminal import quieten, say
from tl_entity.cli.values import whole_number
from tl_entity.study.settings import (
    GROUPS,
    MOST,
    Settings,
    planted,
    resolve_sizes,
)

_GROUPS = {
    "model": ("base",),
    "what is done": ("prompts", "boxes", "sizes", "receiver_sizes"),
    "how it is computed": ("dtype", "memory", "device"),
}

_SPECIAL = SPECIAL | {
    "base": Option(
        metavar="MODEL",
        read=SPECIAL["base"].read,
        help=f"{SPECIAL['base'].help}; no weights are fetched or read",
        also=("--model",),
    ),
    "prompts": Option(
        read=whole_number(1, MOST["prompts"]), help="prompts, or pairs of them (default: 200)"
    ),
    "boxes": Option(read=whole_number(1)),
    "sizes": Option(
        metavar="A,B,C,D",
        read=SPECIAL["sizes"].read,
        help="heads in each of the four groups (default: as in reproduce)",
    ),
}


def add(commands: "Commands[OneLineParser]") -> None:
    """Add the command."""
    command = commands.add_parser(
        "plan",
        help="what a long run will take, before it is started",
        description="Counts, from a model's configuration alone, the operations and the memory of "
        "each step on the exact engine, and the runs that plain hooks would need; then times "
        "matrix products of these shapes for about a second to estimate how long each step takes "
        "on this machine. Where a model's circuit is not known, its heads are taken to be spread "
        "over the upper half of the layers.",
        usage="%(prog)s [options]",
    )
    add_options(command, Settings, _GROUPS, _SPECIAL)
    add_gguf(command, "model")
    command.group("what is done").add_argument(
        "--circuits",
        type=whole_number(1, MOST["random_circuits"] + 1),
        default=11,
        metavar="N",
        help="how many circuits are evaluated (default: 11, one and ten random ones)",
    )
    output = command.group("output")
    output.add_argument("--untimed", action="store_true", help="count only, without calibration")
    output.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    base = name_of_base(options)
    settings = Settings(
        base=base,
        tuned=None,
        prompts=max(2, options.prompts),
        memory=options.memory,
        sizes=options.sizes and dict(zip(GROUPS, options.sizes, strict=True)),
        receiver_sizes=options.receiver_sizes
        and dict(zip(GROUPS[:-1], options.receiver_sizes, strict=True)),
    )
    check_early(models=(base,), device=options.device)
    quieten()
    from tl_entity.planning.plan import (
        box_layout,
        entity_tracking_jobs,
        plan,
        read_configuration,
    )
    from tl_entity.tasks.pairs import discovery_pairs

    cfg, tokenizer = read_configuration(base, dtype=options.dtype, device=options.device)
    sizes, receivers = resolve_sizes(settings, cfg.n_layers * cfg.n_heads)
    known = planted(base) if options.sizes is options.receiver_sizes is None else None
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
        say(json.dumps({"model": base, **found.to_dict()}, indent=2))
        return
    for line in found.table():
        say(line)
