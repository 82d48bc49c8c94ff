"""How much a model needs the circuit that was found in it: its accuracy without those heads, beside
its accuracy without as many heads drawn at random at the same tokens, from all layers or from the
circuit's own.

python docs/studies/ablate.py MODEL results/base_circuit.json --out ablation_base.json
python docs/studies/ablate.py MODEL results/tuned_circuit.json --adapter FOLDER --out ablation.json
"""

import argparse
import json
from pathlib import Path

from tl_entity import (
    Circuit,
    Evaluation,
    box_prompts,
    discovery_pairs,
    load_model,
    mean_head_outputs,
    random_circuits,
)
from tl_entity.methods.circuits import evaluate_removals


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("circuit", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--random", type=int, default=10)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    n, boxes, seed = options.prompts, options.boxes, options.seed
    model = load_model(options.model, adapter=options.adapter)
    circuit = Circuit.load(options.circuit)
    prompts = box_prompts(model.tokenizer, n, n_boxes=boxes, seed=seed)
    others = discovery_pairs(model.tokenizer, n, n_boxes=boxes, seed=seed + 1).corrupt
    means = mean_head_outputs(model, others, batch_size=8)
    drawn = random_circuits(model, circuit, options.random, seed=seed + 2)
    matched = random_circuits(model, circuit, options.random, seed=seed + 3, match="layer")
    found = evaluate_removals(
        model, prompts, [{}, circuit, *drawn, *matched], mean_outputs=means, batch_size=8
    )
    whole, without, *others = map(record, found)
    content = {
        "prompts": n,
        "boxes": boxes,
        "seed": seed,
        "heads": len(circuit),
        "whole": whole,
        "without_circuit": without,
        "without_random": others[: len(drawn)],
        "without_random_of_the_same_layers": others[len(drawn) :],
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def record(evaluation: Evaluation) -> dict[str, object]:
    """An accuracy with its interval."""
    return {"accuracy": evaluation.accuracy, "interval": list(evaluation.interval)}


if __name__ == "__main__":
    main()
