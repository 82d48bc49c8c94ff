"""`find_mechanism` beside other ways to choose nodes, on the same prompts and ablation.

    python benchmarks/peers.py default-base --out benchmarks/results/mechanism/default-base.json
    python benchmarks/peers.py smollm2.gguf --task capitals --target 0.85 --agreement 0.8 \
        --training '{"first_steps": 24, "steps": 12, "prompts_per_step": 8, "most_prices": 10}' \
        --out benchmarks/results/mechanism/smollm2_capitals.json
    python benchmarks/peers.py --table benchmarks/results/mechanism/default-base.json

Every way ranks the nodes on prompts that had no part in the report. The first so many of each
ranking, as many as `find_mechanism` found and multiples of it, are then left alone on the reported
prompts.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rankings import RANKINGS, Given, PathStage

from tl_entity import (
    GateTraining,
    Mechanism,
    NodesEvaluation,
    PairBatch,
    PromptBatch,
    box_prompts,
    discovery_pairs,
    evaluate,
    find_mechanism,
    load_model,
    pooled_ablation,
    task_pairs,
    task_prompts,
)
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gated_forward import GatedForward

BOXES = "boxes"
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
"""Sizes at which rankings are compared, as multiples of the mechanism's."""

OURS = "find_mechanism"

STAGES = {
    BOXES: (
        PathStage("last", "last"),
        PathStage("last", "last", into=0, inputs="q"),
        PathStage("query_label", "query_label", into=1, inputs="v"),
        PathStage("previous_query_label", "label", into=2, inputs="v"),
    ),
    "capitals": (
        PathStage("last", "last", n_receivers=5),
        PathStage("last", "last", into=0, inputs="q"),
        PathStage("country", "country", into=0, inputs="v"),
        PathStage("country", "country", into=0, inputs="k"),
    ),
}


def main() -> None:
    """Run one model, or write tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--task", default=BOXES, choices=list(STAGES))
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--ranked", type=int, default=64, help="prompts that are ranked on")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--agreement", type=float, default=0.85)
    parser.add_argument("--training", type=json.loads, default={}, help="fields of GateTraining")
    parser.add_argument("--skip", nargs="*", default=[], help="rankings to leave out")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    for path in options.table:
        sys.stdout.write(table(json.loads(path.read_text(encoding="utf-8"))) + "\n")
    if options.model is not None:
        content = run(options)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(table(content) + "\n")


def drawn(tokenizer, options) -> tuple[PromptBatch, PairBatch]:
    """The prompts that are searched and reported, and pairs of others."""
    n, seed = options.prompts, options.seed
    if options.task == BOXES:
        pairs = discovery_pairs(tokenizer, 200, n_boxes=7, seed=seed + 1)
        return box_prompts(tokenizer, n, n_boxes=7, seed=seed), pairs
    return task_prompts(options.task, tokenizer, n, seed), task_pairs(
        options.task, tokenizer, 200, seed + 1
    )


def run(options) -> dict[str, object]:
    """All that is written of one model."""
    model = load_model(options.model)
    prompts, pairs = drawn(model.tokenizer, options)
    ablation = pooled_ablation(model, pairs.corrupt, batch_size=options.batch_size)
    how = {"batch_size": options.batch_size}
    used = time.process_time()
    mechanism = find_mechanism(
        model,
        prompts,
        ablation=ablation,
        target=options.target,
        agreement=options.agreement,
        training=GateTraining(**options.training),
        curve=[m for m in MULTIPLES if m != 1],
        n_random=1,
        **how,
    )
    seconds = {OURS: time.process_time() - used}
    forward = GatedForward.of(model, ablation, **how)
    pairs = pairs[evaluate(model, pairs.clean, **how).correct.nonzero().squeeze(1)]
    pairs = pairs[: options.ranked]
    gates = Gates.filled(model.cfg, mechanism.roles, 1)
    given = Given(
        forward, forward.record(pairs.clean), gates, pairs, STAGES[options.task], how["batch_size"]
    )
    reported = forward.record(reporting(prompts, mechanism))
    found = {OURS: {str(p.n_nodes): numbers(p) for p in mechanism.curve}}
    for name, rank in RANKINGS.items():
        if name in options.skip:
            continue
        used = time.process_time()
        scores = rank(given)
        seconds[name] = time.process_time() - used
        found[name] = alone(forward, reported, gates, scores, len(mechanism))
        sys.stderr.write(f"{name}: {seconds[name]:.1f} s\n")
    return {
        "model": Path(options.model).stem,
        "task": options.task,
        "nodes": len(mechanism),
        "of": mechanism.n_all,
        "ablation": mechanism.ablation,
        "ranked_on": len(pairs),
        "reported_on": len(reported),
        "accuracy_of_the_model": mechanism.found.whole.accuracy,
        "random": numbers(mechanism.random[0]),
        "seed": options.seed,
        "training": options.training,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor_seconds": {name: round(took, 1) for name, took in seconds.items()},
        "found": found,
    }


def reporting(prompts: PromptBatch, mechanism: Mechanism) -> PromptBatch:
    """The prompts that the mechanism was reported on: the same split."""
    from tl_entity.methods.mechanism import split_prompts

    return split_prompts(prompts, mechanism.seed)[-1]


def alone(forward, reported, gates: Gates, scores: torch.Tensor, n: int) -> dict[str, object]:
    """How the first nodes of a ranking answer alone, by their number."""
    order = scores.argsort(descending=True, stable=True)
    each = []
    sizes = [min(round(multiple * n), len(scores)) for multiple in MULTIPLES]
    for size in sizes:
        values = torch.zeros_like(gates.flat())
        values[order[:size]] = 1
        each.append(gates.with_values(values))
    found = forward.evaluate(reported, each)
    return {str(point.n_nodes): numbers(point) for point in found}


def numbers(point: NodesEvaluation) -> dict[str, list[float]]:
    """What is measured of some nodes alone, with intervals."""
    return {
        name: [round(number, 4) for number in (value, *interval)]
        for name, (value, interval) in point.measured.items()
    }


def table(content) -> str:
    """A Markdown table: faithfulness by number of nodes."""
    n, found = content["nodes"], content["found"]
    sizes = [str(round(multiple * n)) for multiple in MULTIPLES]
    head = [f"{content['model']}, {content['task']}", *(f"{size} nodes" for size in sizes)]
    lines = ["| " + " | ".join([*head, f"agreement at {n}", "processor seconds"]) + " |"]
    lines.append("|---" * (len(sizes) + 3) + "|")
    for name, points in found.items():
        cells = [cell(points[size]["faithfulness"]) for size in sizes]
        cells.append(cell(points[str(n)]["agreement"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {content['processor_seconds'][name]} |")
    drawn = content["random"]
    lines.append(
        f"| random, same layers and roles | | {cell(drawn['faithfulness'])} | | | "
        f"{cell(drawn['agreement'])} | |"
    )
    return "\n".join(lines)


def cell(measured: list[float]) -> str:
    """A number with its interval."""
    value, low, high = (f"{number:.2f}".removeprefix("0") for number in measured)
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
