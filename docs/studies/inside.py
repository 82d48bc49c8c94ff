"""The mechanisms of a model and of its fine-tune, each run alone in each of the two.

python docs/studies/inside.py MODEL --adapter ADAPTER --base base.safetensors \
    --tuned tuned.safetensors --out inside.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tl_entity import box_prompts, discovery_pairs, load_model, pooled_ablation
from tl_entity.methods.mechanism_result import Mechanism


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--base", type=Path, required=True, help="the base's mechanism")
    parser.add_argument("--tuned", type=Path, required=True, help="the fine-tune's mechanism")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--others", type=int, default=100, help="prompts for the ablation")
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--seed", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {name: Mechanism.load(getattr(options, name)) for name in ("base", "tuned")}
    content: dict[str, Any] = {}
    for where in found:
        model = load_model(options.model, adapter=None if where == "base" else options.adapter)
        how: dict[str, Any] = {"n_boxes": options.boxes}
        prompts = box_prompts(model.tokenizer, options.prompts, seed=options.seed, **how)
        others = discovery_pairs(model.tokenizer, options.others, seed=options.seed + 1, **how)
        ablation = pooled_ablation(model, others.corrupt, batch_size=options.batch_size)
        for name, mechanism in found.items():
            alone = mechanism.evaluate(
                model, prompts, ablation=ablation, batch_size=options.batch_size
            )
            content[f"{name} in {where}"] = {
                "nodes": len(mechanism.nodes),
                "faithfulness": [alone.faithfulness.value, *alone.faithfulness.interval],
                "agreement": [alone.agreement, *alone.agreement_interval],
                "accuracy": alone.alone.accuracy,
                "of_model": alone.whole.accuracy,
                "kl": alone.mean_kl,
                "prompts": options.prompts,
                "seed": options.seed,
            }
            sys.stderr.write(f"{name} in {where}: {alone}\n")
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
