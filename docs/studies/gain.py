"""Where the gain of a fine-tune lies: shares of the weights, grafts both ways, and what needs no
look inside.

python docs/studies/gain.py MODEL --adapter ADAPTER --out gain_tuned
    writes gain_tuned.json, and the whole results as gain_tuned.shares.safetensors and so on

The prompts of the grafts have no part in the shares.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tl_entity import (
    Evaluation,
    box_prompts,
    compare_behaviour,
    four_corners,
    graft_curve,
    load_model,
    weight_shares,
)
from tl_entity.choices import GIB
from tl_entity.methods.grafts import GraftCurve, Grafted
from tl_entity.methods.shares_inside import Part
from tl_entity.tasks.boxes import sample_prompts

SIZES = (5, 10, 20, 40, 80, 120, 160, 240, 320)
"""Units that are grafted."""


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="the fine-tune is the model with it merged")
    parser.add_argument("--tuned", help="or a model of its own")
    parser.add_argument("--prompts", type=int, default=300, help="for the shares")
    parser.add_argument("--held-out", type=int, default=300, help="for the grafts")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--draws", type=int, default=3, help="of random units")
    parser.add_argument("--corners", type=int, default=100, help="prompts; 0 for no corners")
    parser.add_argument("--behaviour", type=int, default=100, help="prompts a number of boxes")
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--memory", type=float, help="GiB for intermediate results")
    parser.add_argument("--seed", type=int, default=500)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    how: dict[str, Any] = {"batch_size": options.batch_size}
    if options.memory:
        how["memory"] = int(options.memory * GIB)
    base = load_model(options.model, device=options.device)
    tuned = load_model(
        options.tuned or options.model, adapter=options.adapter, device=options.device
    )
    clock = Clock(str(base.cfg.device))

    def prompts(n: int, seed: int) -> Any:
        return box_prompts(base.tokenizer, n, n_boxes=options.boxes, seed=seed)

    shares = weight_shares(base, tuned, prompts(options.prompts, options.seed), **how)
    shares.save(options.out.with_suffix(".shares.safetensors"))
    clock.lap("shares")
    content: dict[str, Any] = {
        "prompts": options.prompts,
        "held_out": options.held_out,
        "boxes": options.boxes,
        "seed": options.seed,
        "gain": [shares.gain, *shares.gain_interval],
        "metric": shares.metric,
        "units": len(shares.units),
        "sum": shares.total,
        "integration_error": shares.integration_error,
        "prompt_error": shares.prompt_error,
        "points": shares.n_points,
        "by_kind": {kind: part_numbers(part) for kind, part in shares.by_kind().items()},
        "by_layer": {str(layer): part_numbers(part) for layer, part in shares.by_layer().items()},
        "ranked": [
            [str(unit), round(shares.share(unit), 6)] for unit in shares.top(max(options.sizes))
        ],
    }
    curve = graft_curve(
        base,
        tuned,
        prompts(options.held_out, options.seed + 1),
        shares,
        sizes=[size for size in options.sizes if size < len(shares.units)],
        seeds=range(options.draws),
    )
    curve.save(options.out.with_suffix(".grafts.safetensors"))
    clock.lap("grafts")
    content["grafts"] = curve_numbers(curve)
    if options.corners:
        corners = four_corners(base, tuned, prompts(options.corners, options.seed + 2), **how)
        corners.save(options.out.with_suffix(".corners.safetensors"))
        content["corners"] = json.loads(corners.to_dataframe().to_json(orient="records"))
        clock.lap("corners")
    if options.behaviour:
        asked = [
            prompt
            for n_boxes in (3, 5, 7)
            for prompt in sample_prompts(options.behaviour, n_boxes=n_boxes, seed=options.seed + 3)
        ]
        behaviour = compare_behaviour(base, tuned, asked, batch_size=options.batch_size)
        behaviour.save(options.out.with_suffix(".behaviour.safetensors"))
        content["behaviour"] = json.loads(behaviour.to_dataframe().to_json(orient="records"))
        clock.lap("behaviour")
    content["seconds"] = clock.seconds
    content["device"] = clock.device
    options.out.with_suffix(".json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )
    sys.stdout.write(f"{shares}\n{curve}\n")


class Clock:
    """Wall seconds of one part after another."""

    def __init__(self, device: str) -> None:
        self.device = (
            torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
        )
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """A part is done."""
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 1), now
        sys.stderr.write(f"{name}: {self.seconds[name]} s\n")


def part_numbers(part: Part) -> dict[str, Any]:
    """Some units' share, its interval, and the share of the gain."""
    return {
        "units": part.n_units,
        "share": part.share,
        "interval": [*part.interval],
        "of_gain": part.of_gain,
    }


def curve_numbers(curve: GraftCurve) -> dict[str, Any]:
    """Accuracies of grafts, with intervals."""
    enough = curve.smallest(0.9)
    return {
        "base": accuracy(curve.base),
        "tuned": accuracy(curve.tuned),
        "units": curve.n_units,
        "smallest_with_nine_tenths": None if enough is None else len(enough.units),
        "entries": [entry_numbers(entry) for entry in curve.entries],
    }


def entry_numbers(entry: Grafted) -> dict[str, Any]:
    return {
        "order": entry.order,
        "units": len(entry.units),
        "share": entry.share,
        "base_with_them": accuracy(entry.grafted),
        "tuned_without_them": accuracy(entry.removed),
    }


def accuracy(found: Evaluation) -> list[float]:
    """Accuracy and its interval."""
    return [found.accuracy, *found.interval]


if __name__ == "__main__":
    main()
