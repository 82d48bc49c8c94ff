"""The mechanism of a model: the fewest nodes, blind to the box asked about, that alone answer as it
does; beside random nodes of the same layers and roles, and a circuit of the paper's four groups. Of
the box task, or of another task that ships.

python docs/studies/mechanism.py MODEL --circuit results/base_circuit.json --out mechanism.json
python docs/studies/mechanism.py MODEL --adapter FOLDER --out mechanism.json
python docs/studies/mechanism.py MODEL --task capitals --prompts 180 --out mechanism.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from tl_entity import (
    Circuit,
    GateTraining,
    NodesEvaluation,
    PromptBatch,
    box_prompts,
    discovery_pairs,
    find_mechanism,
    load_model,
    pooled_ablation,
    task_pairs,
    task_prompts,
)
from tl_entity.choices import GIB
from tl_entity.methods.mechanism import MechanismStep

BOXES = "boxes"
"""The task of the paper."""


def main() -> None:
    """Find it, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--task", default=BOXES, help="one of those that ship; boxes if left out")
    parser.add_argument("--circuit", type=Path)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--others", type=int, default=100, help="prompts for the ablation")
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--agreement", type=float, default=0.8)
    parser.add_argument("--training", type=json.loads, default={}, help="fields of GateTraining")
    parser.add_argument("--curve", type=float, nargs="*", default=[0.5, 2.0])
    parser.add_argument("--random", type=int, default=1)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--memory", type=float, help="GiB for intermediate results")
    parser.add_argument("--device")
    parser.add_argument("--save", type=Path, help="keep the whole result in this file")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = load_model(options.model, adapter=options.adapter, device=options.device)
    prompts, others = drawn(model.tokenizer, options)
    began, used = time.perf_counter(), time.process_time()
    found = find_mechanism(
        model,
        prompts,
        ablation=pooled_ablation(model, others, batch_size=options.batch_size),
        target=options.target,
        agreement=options.agreement,
        circuit=None if options.circuit is None else Circuit.load(options.circuit),
        training=GateTraining(**options.training),
        curve=options.curve,
        n_random=options.random,
        seed=options.seed,
        batch_size=options.batch_size,
        memory=None if options.memory is None else int(options.memory * GIB),
        progress=show,
    )
    seconds = {
        "wall_seconds": round(time.perf_counter() - began),
        "processor_seconds": round(time.process_time() - used),
        "threads": torch.get_num_threads(),
    }
    if options.save is not None:
        found.save(options.save)
    content = {
        "model": Path(options.model).stem,
        "task": options.task,
        "prompts": {
            "training": found.n_training,
            "choosing": found.n_choosing,
            "reporting": len(found.found),
        },
        "boxes": options.boxes if options.task == BOXES else None,
        "seed": options.seed,
        "ablation": found.ablation,
        "target": found.target,
        "agreement_target": found.agreement_target,
        "training": options.training,
        **seconds,
        "all_nodes": found.n_all,
        "accuracy_of_the_model": found.found.whole.accuracy,
        "accuracy_interval": list(found.found.whole.interval),
        "roles": list(found.roles),
        "mechanism": numbers(found.found),
        "curve": [numbers(point) for point in found.curve],
        "random": [numbers(point) for point in found.random],
        "circuit": None if found.circuit is None else numbers(found.circuit),
        "cpr": found.cpr,
        "cmd": found.cmd,
        "prices": [step._asdict() for step in found.prices],
        "nodes": [str(node) for node in found.nodes],
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{found}\n")


def drawn(tokenizer, options) -> tuple[PromptBatch, PromptBatch]:
    """The prompts that are searched and reported, and others for the ablation."""
    n, seed = options.prompts, options.seed
    if options.task == BOXES:
        pairs = discovery_pairs(tokenizer, options.others, n_boxes=options.boxes, seed=seed + 1)
        return box_prompts(tokenizer, n, n_boxes=options.boxes, seed=seed), pairs.corrupt
    pairs = task_pairs(options.task, tokenizer, options.others, seed + 1)
    return task_prompts(options.task, tokenizer, n, seed), pairs.corrupt


def numbers(point: NodesEvaluation) -> dict[str, object]:
    """What is measured of some nodes alone, with intervals."""
    measured = {
        name: [round(number, 4) for number in (value, *interval)]
        for name, (value, interval) in point.measured.items()
    }
    return {"nodes": point.n_nodes, **measured}


def show(step: MechanismStep) -> None:
    """One line a step."""
    loss = "" if step.loss is None else f" loss {step.loss:.4f}"
    nodes = "" if step.n_nodes is None else f" {step.n_nodes} nodes"
    sys.stderr.write(f"{step.doing} {step.done}{nodes}{loss}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
