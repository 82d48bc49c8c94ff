"""The mechanism of a task that ships: the fewest (head, role) nodes that alone answer as the model.

python docs/studies/tasks.py MODEL indirect_objects --out mechanism.json
python docs/studies/tasks.py MODEL capitals --prompts 180 --out mechanism.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tl_entity import (
    GateTraining,
    evaluate,
    find_mechanism,
    load_model,
    pooled_ablation,
    task_pairs,
    task_prompts,
)
from tl_entity.methods.mechanism import MechanismStep


def main() -> None:
    """Find it, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--agreement", type=float, default=0.8)
    parser.add_argument("--training", type=json.loads, default={}, help="fields of GateTraining")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = load_model(options.model)
    prompts = task_prompts(options.task, model.tokenizer, options.prompts, options.seed)
    others = task_pairs(options.task, model.tokenizer, 100, options.seed + 1).corrupt
    whole = evaluate(model, prompts, batch_size=16)
    sys.stderr.write(f"{whole}\n")
    began, used = time.perf_counter(), time.process_time()
    found = find_mechanism(
        model,
        prompts,
        ablation=pooled_ablation(model, others, batch_size=16),
        target=options.target,
        agreement=options.agreement,
        training=GateTraining(**options.training),
        seed=options.seed,
        batch_size=16,
        progress=show,
    )
    content = {
        "model": Path(options.model).stem,
        "task": options.task,
        "accuracy": whole.accuracy,
        "accuracy_interval": list(whole.interval),
        "prompts": options.prompts,
        "training": options.training,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began),
        "processor_seconds": round(time.process_time() - used),
        "said": str(found),
        "random": [point.faithfulness.value for point in found.random],
        "roles": list(found.roles),
        "nodes": [str(node) for node in found.nodes],
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(step: MechanismStep) -> None:
    """A line for each step."""
    sys.stderr.write(f"{step}\n")


if __name__ == "__main__":
    main()
