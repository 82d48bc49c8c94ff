"""The exact engine beside plain hooks: time, agreement, memory, growth. One run, one JSON file.

    python benchmarks/engine.py --quick
    python benchmarks/engine.py --smollm2 FOLDER --threads 1
    python benchmarks/engine.py --models random-llama-7b --prompts 300 --device cuda \
        --matmul-precision high
    python benchmarks/engine.py --table

The last writes docs/benchmarks.md from the JSON files in benchmarks/results.

Both engines run in turn, several times, and the least time of each counts. Plain hooks take hours
for all senders of a real model: there, a sample of senders that can reach a receiver is run, and
its mean is taken for all of these; senders that can't reach one cost nothing in either engine.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from engine_jobs import Clock, Engines, engines_of, path_patching
from engine_models import RANDOM, model_and_pairs, random_llama, random_pairs, title
from engine_table import RESULTS, write_table
from transformer_lens import HookedTransformer

from tl_entity import PairBatch
from tl_entity.errors import InputError
from tl_entity.exact.memory import memory_budget
from tl_entity.exact.precision import float32_matmul_precision
from tl_entity.planning.machine import calibrate
from tl_entity.planning.plan import spread_heads


@dataclass(frozen=True)
class Row:
    """One job on both engines.

    Attributes:
        job: what is computed.
        exact_seconds: the exact engine, all of it.
        hooks_seconds: plain hooks, all of it; None if they were not run.
        plain_seconds: the same with the logits of every token, as a plain `run_with_hooks` gives
            them; our hooks engine computes those of the answer alone.
        hooks_run: how many of the senders (circuits, choices) plain hooks really ran.
        hooks_all: how many there are that they would have to run.
        ratio: hooks over exact.
        plain_ratio: plain over exact.
        difference: largest absolute difference between the engines, over what both ran: of
            per-example scores, or of answers' log probabilities, or of the mask's gradient.
        precision_error: largest absolute difference of the exact engine from itself with float32
            products as precise as there are; None where they were.
        operations_ratio: counted operations of plain hooks over those of the exact engine.
        gflop: counted operations of the exact engine, in billions.
        gflop_per_second: these over exact_seconds.
        matmul_gflop_per_second: rate of the same matrix products made by themselves.
        matmul_share: the first rate over the second.
        planned_bytes: activations at their most, as planned.
        peak_bytes: growth of resident memory over the job, measured in a process of its own.
    """

    job: str
    exact_seconds: float
    hooks_seconds: float | None
    plain_seconds: float | None
    hooks_run: int
    hooks_all: int
    ratio: float | None
    plain_ratio: float | None
    difference: float | None
    precision_error: float | None = None
    operations_ratio: float = 0.0
    gflop: float = 0.0
    gflop_per_second: float = 0.0
    matmul_gflop_per_second: float = 0.0
    matmul_share: float = 0.0
    planned_bytes: int = 0
    peak_bytes: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks, or write the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.table:
            write_table()
        elif options.memory_of:
            measure_memory(options)
        else:
            run(options)
    except InputError as error:
        _note(str(error))
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Run what was asked for and write the JSON file after every job."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    names = options.models or ["default-tuned", "random-256", "random-512", "random-1024"]
    if options.quick:
        names = options.models or ["default-tuned", "random-256"]
        options.prompts, options.repetitions = min(4, options.prompts), 1
    if options.smollm2:
        names.insert(1, options.smollm2)
    elif not options.models:
        _note("SmolLM2-135M is left out: give its folder as --smollm2.")
    RESULTS.mkdir(exist_ok=True)
    results: dict[str, Any] = {
        "machine": describe_machine(options),
        "settings": {
            "prompts": options.prompts,
            "boxes": options.boxes,
            "repetitions": options.repetitions,
            "dtype": "float32",
            "matmul_precision": options.matmul_precision,
            "seconds": "of the processor"
            if options.device == "cpu" and options.threads == 1
            else "of the wall clock",
        },
        "models": [],
        "growth": {},
    }
    with float32_matmul_precision(options.matmul_precision):
        for name in names:
            for found in benchmark_model(name, options):
                others = [model for model in results["models"] if model["name"] != found["name"]]
                results["models"] = [*others, found]
                _save(results, options.out)
        if not options.no_growth:
            results["growth"] = growth(options)
            _save(results, options.out)


def benchmark_model(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All jobs on one model: what is known of it after each of them."""
    model, pairs = model_and_pairs(name, options)
    clock = Clock(torch.device(options.device))
    memory = memory_budget(model.cfg.device)
    jobs = engines_of(model, name, pairs, options, clock)
    _note(f"{title(name)}: {len(jobs)} jobs on {len(pairs)} prompts")
    rows = []
    for job, set_up in jobs.items():
        both = set_up()
        if options.exact_only:
            both = replace(both, hooks=None, plain=None)
        count = both.job.count(model, both.pairs, memory)
        # Matrix products are timed beside the job that makes them: the machine's speed drifts.
        tally = count.tally
        where = {"device": model.cfg.device, "dtype": model.cfg.dtype}
        before = calibrate([tally], **where)
        row = time_job(job, both, clock, options.repetitions)
        after = before if options.quick else calibrate([tally], **where)
        operations = tally.total_operations
        alone = min(before.product_seconds(tally), after.product_seconds(tally))
        row = replace(
            row,
            operations_ratio=count.hooks_operations / operations,
            gflop=operations / 1e9,
            gflop_per_second=operations / 1e9 / row.exact_seconds,
            matmul_gflop_per_second=operations / 1e9 / alone,
            matmul_share=alone / row.exact_seconds,
            planned_bytes=count.cache_bytes + count.chunk_bytes,
            peak_bytes=None if options.quick else peak_bytes_of(job, name, options),
        )
        rows.append(row)
        ratio = "" if row.ratio is None else f", {row.ratio:.1f} times hooks"
        _note(f"  {job}: {row.exact_seconds:.2f} s{ratio}")
        yield described(model, name, pairs, rows)


def described(
    model: HookedTransformer, name: str, pairs: PairBatch, rows: Sequence[Row]
) -> dict[str, Any]:
    """A model's sizes, and the rows there are."""
    cfg = model.cfg
    return {
        "name": title(name),
        "layers": cfg.n_layers,
        "heads": cfg.n_heads,
        "key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "prompts": len(pairs),
        "tokens": pairs.clean.tokens.shape[1],
        "rows": [asdict(row) for row in rows],
    }


def time_job(job: str, both: Engines, clock: Clock, repetitions: int) -> Row:
    """Both engines in turn, the least time of each."""
    exact_seconds, set_up, sample, plain = [], [], [], []
    exact = hooks = None
    for _ in range(repetitions):
        seconds, exact = clock.timed(both.exact)
        exact_seconds.append(seconds)
        if both.hooks is not None:
            once, some, hooks = both.hooks()
            set_up.append(once)
            sample.append(some)
        if both.plain is not None:
            once, some, scores = both.plain()
            plain.append(once + some * both.n_all / max(1, len(scores)))
    hooks_seconds = difference = precision_error = None
    if hooks is not None:
        hooks_seconds = min(set_up) + min(sample) * both.n_all / max(1, both.n_run)
        difference = float((both.compared(exact) - hooks).abs().max()) if hooks.numel() else 0.0
    if torch.get_float32_matmul_precision() != "highest":
        with float32_matmul_precision("highest"):
            precise = both.compared(both.exact())
        precision_error = float((both.compared(exact) - precise).abs().max())
    least = min(exact_seconds)
    return Row(
        job=job,
        exact_seconds=least,
        hooks_seconds=hooks_seconds,
        plain_seconds=min(plain, default=None),
        hooks_run=both.n_run,
        hooks_all=both.n_all,
        ratio=None if hooks_seconds is None else hooks_seconds / least,
        plain_ratio=min(plain) / least if plain else None,
        difference=difference,
        precision_error=precision_error,
    )


def peak_bytes_of(job: str, name: str, options: argparse.Namespace) -> int | None:
    """The job's memory, measured in a process of its own; None where that can't be."""
    if options.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--memory-of", job, "--models", name]
    for option in ("prompts", "boxes", "device", "threads", "matmul_precision"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    if options.receivers:
        command += ["--receivers", ",".join(map(str, options.receivers))]
    # Without this, memory freed ahead of the job is used again and no growth is seen.
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given_back)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def measure_memory(options: argparse.Namespace) -> None:
    """In a process of its own: write how much memory grows over one job on the exact engine."""
    torch.set_num_threads(options.threads)
    (name,) = options.models
    model, pairs = model_and_pairs(name, options)
    options.quick, options.only = False, None
    clock = Clock(torch.device(options.device))
    # A first run of little touches all weights, which a mapped file has in memory only then.
    with float32_matmul_precision(options.matmul_precision):
        job = engines_of(model, name, pairs, options, clock)[options.memory_of]()
        engines_of(model, name, pairs[:1], options, clock)["logits"]().exact()
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(clock.device)
            before = torch.cuda.memory_allocated(clock.device)
            job.exact()
            grown = torch.cuda.max_memory_allocated(clock.device) - before
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = _status("VmRSS")
            job.exact()
            grown = _status("VmHWM") - before
    sys.stdout.write(f"{grown}\n")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise InputError(f"This system does not tell {field}.")


def growth(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The exact engine alone as prompts, heads, layers and length double."""
    sizes = {"n_layers": 8, "d_model": 256, "n_heads": 8, "n_kv_heads": 8, "d_head": 32}
    sizes |= {"d_mlp": 704}
    steps = 2 if options.quick else 4
    found: dict[str, list[dict[str, float]]] = {}
    firsts = {"prompts": 4, "heads": 4, "layers": 4, "boxes": 3}
    if options.quick:
        firsts = {"prompts": 4}
    for what, first in firsts.items():
        found[what] = []
        for value in [first * 2**step for step in range(steps)]:
            here = dict(sizes)
            if what in ("heads", "layers"):
                here[f"n_{what}"] = value
                if what == "heads":
                    here["n_kv_heads"] = value
            model = random_llama(here, options.device)
            n_prompts = value if what == "prompts" else options.prompts
            pairs = random_pairs(model, n_prompts, value if what == "boxes" else 7)
            clock = Clock(torch.device(options.device))
            receivers = spread_heads(model.cfg, 2)
            stages = {
                "logits": path_patching(model, pairs, clock, "last"),
                "v at previous query label": path_patching(
                    model, pairs, clock, "previous_query_label", receivers, "v"
                ),
            }
            point: dict[str, float] = {what: value, "tokens": pairs.clean.tokens.shape[1]}
            for stage, both in stages.items():
                both.exact()
                seconds = min(clock.timed(both.exact)[0] for _ in range(options.repetitions))
                count = both.job.count(model, pairs, memory_budget(model.cfg.device))
                point[f"{stage}, seconds"] = seconds
                point[f"{stage}, gflop"] = count.tally.total_operations / 1e9
            found[what].append(point)
        _note(f"growth with {what}: done")
    return found


def describe_machine(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to know of the machine, and nothing that names it."""
    processor = platform.processor() or platform.machine()
    cpu_file = Path("/proc/cpuinfo")
    if cpu_file.exists():
        for line in cpu_file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    if torch.device(options.device).type == "cuda":
        processor = torch.cuda.get_device_name(options.device)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "note": options.note,
    }


def _save(results: Mapping[str, Any], name: str) -> None:
    text = json.dumps(results, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def _note(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", help=f"names, folders, or {', '.join(RANDOM)}")
    add("--smollm2", help="folder of SmolLM2-135M")
    add("--prompts", type=int, default=10, help="(default: 10)")
    add("--boxes", type=int, default=7, help="(default: 7)")
    add("--receivers", type=lambda text: [int(part) for part in text.split(",")], metavar="A,B,C")
    add("--repetitions", type=int, default=3, help="(default: 3)")
    add("--threads", type=int, default=1, help="(default: 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--matmul-precision", choices=["highest", "high", "medium"], default="highest")
    add("--only", nargs="+", help="jobs whose name contains one of these")
    add("--exact-only", action="store_true", help="leave plain hooks out")
    add("--no-growth", action="store_true", help="leave growth out")
    add("--quick", action="store_true", help="little of everything, in a minute")
    add("--out", default="cpu", metavar="NAME", help="benchmarks/results/NAME.json")
    add("--note", default="", help="a sentence on the machine, for the table")
    add("--table", action="store_true", help="only write docs/benchmarks.md")
    add("--memory-of", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
