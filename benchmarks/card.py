"""What a graphics card does with all of it: agreement with the CPU, Llama-7B's shape, memory.

    bash benchmarks/card.sh NAME           at most eight minutes on a card
    bash benchmarks/card.sh NAME --small   the same on whatever there is, of small size

Every method of the library runs on a small random model, on the CPU in float64 and on the card in
float64, float32, TF32 and bfloat16; the largest difference of each stands beside it. Then the four
stages of path patching run in a model of Llama-7B's shape, whose random weights are made on the
card. One part's failure is written down and stops no other.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_models import RANDOM, noisy_copy, random_llama, random_pairs
from transformer_lens import HookedTransformer

from tests.all_methods import METHODS, PLAIN_RUNS, WEIGHTS
from tests.random_models import random_model
from tests.random_models import random_pairs as small_pairs
from tl_entity import path_patch, weight_shares
from tl_entity.exact.memory import memory_budget
from tl_entity.exact.precision import float32_matmul_precision
from tl_entity.hooks.points import HeadInput
from tl_entity.planning.jobs import PathPatching
from tl_entity.planning.plan import spread_heads

RESULTS = Path(__file__).parent / "results"

PRECISIONS = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}
"""What a model's weights are in, and how precisely float32 products are taken."""

STAGES: Mapping[str, tuple[str, int | None, HeadInput | None]] = {
    "A, into the logits": ("last", None, None),
    "B, into 20 queries": ("last", 20, "q"),
    "C, into 5 values": ("query_label", 5, "v"),
    "D, into 10 values": ("previous_query_label", 10, "v"),
}
"""Position, how many heads are patched into, and which of their inputs; sizes as in the paper."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        model: by its name among the random Llamas.
        pairs: prompts of a stage.
        pairs_of_d: of the last stage, whose receivers read many tokens.
        pairs_of_shares: for weight shares.
    """

    model: str = "random-llama-7b"
    pairs: int = 32
    pairs_of_d: int = 8
    pairs_of_shares: int = 4


SMALL = Sizes("random-256", 4, 2, 2)


def main() -> None:
    """Run it all, and write what is known after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default="card", metavar="NAME", help="benchmarks/results/NAME.json"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", help="parts: parity, stages, shares")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "TF32"], help="of stages")
    parser.add_argument("--seconds", type=float, default=420, help="no part is begun after these")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    sizes = SMALL if options.small else Sizes()
    out = RESULTS / f"{options.out}.json"
    out.parent.mkdir(exist_ok=True)
    content: Record = {"machine": machine(options.device), "sizes": vars(sizes)}
    parts: dict[str, Callable[[], Record]] = {"parity": lambda: parity(options.device)}
    for name in options.precisions:
        parts[f"stages, {name}"] = lambda name=name: stages(sizes, name, options.device)
    parts["shares"] = lambda: shares(sizes, options.device)
    began = time.perf_counter()
    for name, part in parts.items():
        if options.only and not any(name.startswith(wanted) for wanted in options.only):
            continue
        spent = time.perf_counter() - began
        content[name] = attempt(part) if spent < options.seconds else {"left out after": spent}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sys.stderr.write(f"{name}: {time.perf_counter() - began - spent:.1f} s\n")


def attempt(part: Callable[[], Record]) -> Record:
    """What a part finds, or why it found nothing."""
    try:
        return part()
    except Exception as error:  # the other parts are wanted all the same
        sys.stderr.write(traceback.format_exc(limit=-4))
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine(device: str) -> Record:
    """What ran it."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


def parity(device: str) -> Record:
    """The largest difference of every method from the CPU in float64, as a share of its largest
    number there. Masks are trained: in bfloat16 other steps may be taken."""
    pairs = small_pairs(6, 9)
    calls = {**METHODS, **PLAIN_RUNS, **WEIGHTS}
    reference = {
        name: call(random_model(n_kv_heads=2), pairs, "exact") for name, call in calls.items()
    }
    found: Record = {}
    for name, call in calls.items():
        found[name] = {}
        for precision, (dtype, products) in PRECISIONS.items():
            model = random_model(n_kv_heads=2, dtype=dtype)
            model.to(device, print_details=False)

            def differ(name: str = name, call: Any = call, model: Any = model) -> Record:
                values = call(model, pairs, "exact").detach().double().cpu()
                wanted = reference[name].detach().double()
                largest = wanted.abs().max().clamp(min=1e-300)
                return {"difference": float((values - wanted).abs().max() / largest)}

            with float32_matmul_precision(products):
                outcome = attempt(differ)
            found[name][precision] = outcome.get("difference", outcome.get("error"))
    return found


def stages(sizes: Sizes, precision: str, device: str) -> Record:
    """Each stage's seconds, operations, share of the card's rate of matrix products, and memory."""
    dtype, products = PRECISIONS[precision]
    model = random_llama(RANDOM[sizes.model], device)
    model.to(dtype, print_details=False)
    with float32_matmul_precision(products):
        rate = product_rate(dtype, device)
        found: Record = {"tflop_per_second_of_products": rate / 1e12}
        for name, (position, n_receivers, receiver_input) in STAGES.items():
            n_pairs = sizes.pairs_of_d if name.startswith("D") else sizes.pairs
            pairs = random_pairs(model, n_pairs, 7)
            heads = None if n_receivers is None else spread_heads(model.cfg, n_receivers)
            found[name] = attempt(
                lambda p=position, h=heads, i=receiver_input, pairs=pairs: stage(
                    model, pairs, PathPatching(p, h, i), rate, device
                )
            )
            sys.stderr.write(f"  {precision} {name}: {found[name]}\n")
    return found


def stage(
    model: HookedTransformer, pairs: Any, job: PathPatching, rate: float, device: str
) -> Record:
    """One stage, run once at a small size first, so that the card has compiled what it needs."""

    def run(some: Any) -> None:
        path_patch(
            model,
            some,
            position=job.position,
            receivers=job.receivers,
            receiver_input=job.receiver_input,
        )

    run(pairs[:1])
    seconds, peak = timed(lambda: run(pairs), device)
    operations = job.count(model, pairs, memory_budget(model.cfg.device)).tally.total_operations
    return {
        "pairs": len(pairs),
        "seconds": seconds,
        "tflop": operations / 1e12,
        "share_of_rate": operations / seconds / rate,
        "peak_gib": peak,
    }


def shares(sizes: Sizes, device: str) -> Record:
    """Weight shares of all weights of attention's outputs, between a model and a noisy copy."""
    model = random_llama(RANDOM[sizes.model], device)
    tuned = noisy_copy(model)
    pairs = random_pairs(model, sizes.pairs_of_shares, 7)
    found: list[Any] = []
    seconds, peak = timed(
        lambda: found.append(weight_shares(model, tuned, pairs, max_points=5)), device
    )
    return {
        "pairs": len(pairs),
        "units": len(found[0].units),
        "points": found[0].n_points,
        "integration_error": found[0].integration_error,
        "seconds": seconds,
        "peak_gib": peak,
    }


def timed(work: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Seconds, and on a card the most memory that tensors took, in GiB, weights included."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of one large matrix product."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a
    repetitions = 5
    seconds, _ = timed(lambda: [a @ a for _ in range(repetitions)], device)
    return repetitions * 2 * n**3 / seconds


if __name__ == "__main__":
    main()
