"""Where the gain of a fine-tune lies: shares of the weights, grafts both ways, and what needs no
look inside.

python docs/studies/gain.py MODEL --adapter ADAPTER --out gain_tuned
    writes gain_tuned.json, and the whole results as gain_tuned.shares.safetensors and so on

The prompts of the grafts have no part in the shares.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformer_lens import HookedTransformer

from tl_entity import (
    Evaluation,
    PromptBatch,
    WeightShares,
    box_prompts,
    compare_behaviour,
    four_corners,
    graft_curve,
    load_model,
    weight_shares,
)
from tl_entity.choices import GIB
from tl_entity.methods.behaviour import Behaviour
from tl_entity.methods.corners import FourCorners
from tl_entity.methods.grafts import GraftCurve, Grafted
from tl_entity.methods.shares_inside import Part
from tl_entity.results import Result
from tl_entity.tasks.boxes import sample_prompts

Found = TypeVar("Found", bound=Result)

SIZES = (5, 10, 20, 40, 80, 120, 160, 240, 320)
"""Units that are grafted."""


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="the fine-tune is the model with it merged")
    parser.add_argument("--tuned", help="or a model of its own")
    parser.add_argument("--shares", type=Path, help="take the shares that this file has")
    parser.add_argument("--prompts", type=int, default=300, help="for the shares")
    parser.add_argument("--held-out", type=int, default=300, help="for the grafts; 0 for none")
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
    pair = Pair(options)
    content: dict[str, Any] = {"boxes": options.boxes, "seed": options.seed}
    if options.shares is None:
        shares = pair.measured("shares", pair.shares)
    else:
        shares = WeightShares.load(options.shares)
    content |= share_numbers(shares, max(options.sizes))
    sys.stdout.write(f"{shares}\n")
    if options.held_out:
        curve = pair.measured("grafts", lambda: pair.grafts(shares))
        content |= {"held_out": options.held_out, "grafts": curve_numbers(curve)}
        sys.stdout.write(f"{curve}\n")
    if options.corners:
        content["corners"] = rows(pair.measured("corners", pair.corners))
    if options.behaviour:
        content["behaviour"] = rows(pair.measured("behaviour", pair.behaviour))
    content |= {"seconds": pair.seconds, "device": pair.device}
    options.out.with_suffix(".json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )


class Pair:
    """The two models, and what is measured of them.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seconds: dict[str, float] = {}

    @functools.cached_property
    def base(self) -> HookedTransformer:
        """The model before."""
        return load_model(self.options.model, device=self.options.device)

    @functools.cached_property
    def tuned(self) -> HookedTransformer:
        """The model after."""
        o = self.options
        return load_model(o.tuned or o.model, adapter=o.adapter, device=o.device)

    @property
    def device(self) -> str | None:
        """What all that is measured ran on; None if nothing was."""
        if not self.seconds:
            return None
        device = str(self.base.cfg.device)
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"

    def measured(self, name: str, measure: Callable[[], Found]) -> Found:
        """What is measured, kept beside the JSON, and how long it took."""
        start = time.perf_counter()
        found = measure()
        found.save(self.options.out.with_suffix(f".{name}.safetensors"))
        self.seconds[name] = round(time.perf_counter() - start, 1)
        sys.stderr.write(f"{name}: {self.seconds[name]} s\n")
        return found

    def prompts(self, n: int, offset: int) -> PromptBatch:
        """Prompts of their own for each thing that is measured."""
        o = self.options
        return box_prompts(self.base.tokenizer, n, n_boxes=o.boxes, seed=o.seed + offset)

    def shares(self) -> WeightShares:
        """Every unit's share of the gain."""
        o = self.options
        memory = None if o.memory is None else int(o.memory * GIB)
        prompts = self.prompts(o.prompts, 0)
        return weight_shares(self.base, self.tuned, prompts, batch_size=o.batch_size, memory=memory)

    def grafts(self, shares: WeightShares) -> GraftCurve:
        """Both ways, beside units by size of their change and at random."""
        o = self.options
        sizes = [size for size in o.sizes if size < len(shares.units)]
        prompts = self.prompts(o.held_out, 1)
        return graft_curve(
            self.base, self.tuned, prompts, shares, sizes=sizes, seeds=range(o.draws)
        )

    def corners(self) -> FourCorners:
        """Base or fine-tune below a layer and above it."""
        o = self.options
        prompts = self.prompts(o.corners, 2)
        return four_corners(self.base, self.tuned, prompts, batch_size=o.batch_size)

    def behaviour(self) -> Behaviour:
        """What needs no look inside."""
        o = self.options
        asked = [
            prompt
            for n_boxes in (3, 5, 7)
            for prompt in sample_prompts(o.behaviour, n_boxes=n_boxes, seed=o.seed + 3)
        ]
        return compare_behaviour(self.base, self.tuned, asked, batch_size=o.batch_size)


def share_numbers(shares: WeightShares, n_ranked: int) -> dict[str, Any]:
    """The gain, what the shares sum to, by kind and by layer, and the first units."""
    return {
        "prompts": len(shares.gain_per_prompt),
        "gain": [shares.gain, *shares.gain_interval],
        "metric": shares.metric,
        "units": len(shares.units),
        "sum": shares.total,
        "integration_error": shares.integration_error,
        "prompt_error": shares.prompt_error,
        "points": shares.n_points,
        "by_kind": {kind: part_numbers(part) for kind, part in shares.by_kind().items()},
        "by_layer": {str(layer): part_numbers(part) for layer, part in shares.by_layer().items()},
        "ranked": [[str(unit), round(shares.share(unit), 6)] for unit in shares.top(n_ranked)],
    }


def rows(found: FourCorners | Behaviour) -> list[dict[str, Any]]:
    """The rows of a result's table."""
    return json.loads(found.to_dataframe().to_json(orient="records"))


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
