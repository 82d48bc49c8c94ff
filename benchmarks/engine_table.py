"""The page of the benchmarks, from their JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from card_table import CARD, card_tables
from engine_models import RANDOM, llama_config

from tl_entity.errors import InputError
from tl_entity.planning.jobs import PathPatching
from tl_entity.planning.plan import box_layout, entity_tracking_jobs, plan

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def write_table() -> None:
    """Write docs/benchmarks.md from the JSON files there are."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise InputError(f"There is no JSON file in {RESULTS.name}; run the benchmark first.")
    lines = [INTRODUCTION]
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        lines += card_tables(content) if file.name.startswith(CARD) else _tables(content)
    lines += _plan_of_llama_7b()
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


INTRODUCTION = """# The exact engine, measured

Written by `python benchmarks/engine.py --table` from the JSON files in `benchmarks/results`. To
measure on your own machine:

```
python benchmarks/engine.py --quick                               # a minute
python benchmarks/engine.py --smollm2 FOLDER --threads 1          # an hour or two
python benchmarks/engine.py --models random-llama-7b --prompts 300 --receivers 20,5,10 \\
    --device cuda --matmul-precision high --exact-only --no-growth --out llama_7b
```

How to read the tables:

- **hooks / exact**: seconds that plain hooks (one full run a sender, on TransformerLens) take for
  the same numbers over those that the exact engine takes, both in one process, in turn, the least
  of several repetitions each. Plain hooks skip senders that can't reach a receiver, too. Where they
  would take long, a sample was run and scaled: `12 of 270`.
- **plain / exact**: the same for `run_with_hooks` as most code calls it, which computes the logits
  of every token; our hooks engine computes those of the answer alone.
- **by count**: the ratio of counted operations, what hooks / exact would be if both engines
  computed nothing but matrix products, equally fast.
- **difference**: the largest absolute difference between the engines over what both ran: of
  per-example scores (path patching), of the answers' log probabilities (circuits, patching), of the
  mask's gradient (mask steps). In brackets, where products are less precise than float32's own: the
  exact engine's difference from itself at full precision.
- **GFLOP**: operations of the matrix products that the exact engine makes, as `tl-entity plan`
  counts them. **GFLOP/s**: these over its seconds. **of matmul**: that over the rate of the same
  products made by themselves, with nothing in between, timed just before and after.
- **peak**: growth of resident memory over the job in a process of its own, activations and all;
  **planned**: what the plan says.
- The two ratios differ most in the logits stage, where our own hooks engine spares the logits that
  nobody reads.
- Receivers of models with no known circuit are spread over the upper half of the layers, as many as
  the paper's share.
- A mask step is one forward and backward pass of a batch of 32 pairs, with all heads at the
  position as candidates, the recorded runs being there. Patching from another model is of outputs,
  q, k and v, of the heads at each of a circuit's positions and of all of them: 16 choices, the
  other model being the same with one per cent of noise on its output projections.
"""


def _plan_of_llama_7b() -> list[str]:
    """What the paper's discovery takes in a model of Llama-7B's shape, counted, not measured."""
    cfg = llama_config(RANDOM["random-llama-7b"], "cpu")
    sizes = {"value_fetcher": 40, "pos_transmitter": 7, "pos_detector": 20, "struct_reader": 5}
    receivers = {"value_fetcher": 20, "pos_transmitter": 5, "pos_detector": 10}
    jobs = entity_tracking_jobs(cfg, sizes=sizes, receivers=receivers)
    stages = {name: job for name, job in jobs.items() if isinstance(job, PathPatching)}
    found = plan(cfg, box_layout(300), stages, memory=32 * 2**30, timed=False)
    lines = [
        "## Llama-7B, planned",
        "",
        "Counted from shapes, as `tl-entity plan` does it: 32 layers of 32 heads, 300 prompts of",
        "53 tokens, 20, 5 and 10 receivers, spread over the upper half of the layers.",
        "",
        "| stage | PFLOP, exact | PFLOP, plain hooks | runs of all prompts, plain hooks |",
        "|---|--:|--:|--:|",
    ]
    for job in found.jobs:
        exact, hooks = sum(job.operations.values()) / 1e15, job.hooks_operations / 1e15
        lines.append(f"| {job.name} | {exact:.2f} | {hooks:,.0f} | {job.hooks_passes:,} |")
    total = sum(sum(job.operations.values()) for job in found.jobs) / 1e15
    plain = sum(job.hooks_operations for job in found.jobs) / 1e15
    passes = sum(job.hooks_passes for job in found.jobs)
    lines += [
        f"| all | **{total:.1f}** | {plain:,.0f} | {passes:,} |",
        "",
        f"In 120 seconds, these {total:.1f} PFLOP ask for {total / 120 * 1e3:.0f} TFLOP/s.",
        "",
    ]
    return lines


def _tables(results: Mapping[str, Any]) -> list[str]:
    machine, settings = results["machine"], results["settings"]
    lines = [
        f"## {machine['processor']}, {machine['threads']} threads",
        "",
        f"{machine['cores']} cores, torch {machine['torch']}, {settings['dtype']}, matrix products "
        f"{settings['matmul_precision']}; seconds {settings['seconds']}, the least of "
        f"{settings['repetitions']}. {machine['note']}",
        "",
    ]
    for model in results["models"]:
        lines += [
            f"### {model['name']}",
            "",
            f"{model['layers']} layers, {model['heads']} heads ({model['key_value_heads']} for "
            f"keys and values), width {model['d_model']}, MLP {model['d_mlp']}, vocabulary "
            f"{model['d_vocab']}; {model['prompts']} prompts of up to {model['tokens']} tokens.",
            "",
            "| job | exact s | hooks s | hooks run | hooks / exact | plain / exact | by count "
            "| difference | GFLOP | GFLOP/s | of matmul | peak MiB | planned MiB |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in model["rows"]:
            plain = "" if row["plain_ratio"] is None else f"{row['plain_ratio']:.1f}"
            hooks = ["", "", "", plain, f"{row['operations_ratio']:.1f}", ""]
            if row["ratio"] is not None:
                hooks = [
                    f"{row['hooks_seconds']:.4g}",
                    f"{row['hooks_run']} of {row['hooks_all']}",
                    f"**{row['ratio']:.1f}**",
                    plain,
                    f"{row['operations_ratio']:.1f}",
                    f"{row['difference']:.1e}",
                ]
            # Files of earlier runs have no such entry.
            if row.get("precision_error") is not None:
                hooks[-1] = f"{hooks[-1]} ({row['precision_error']:.1e})".strip()
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            cells = [
                row["job"],
                f"{row['exact_seconds']:.3g}",
                *hooks,
                f"{row['gflop']:,.1f}",
                f"{row['gflop_per_second']:.1f}",
                f"{row['matmul_share']:.0%}",
                peak,
                f"{row['planned_bytes'] / 2**20:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for what, points in results["growth"].items():
        lines += [f"### Growth with {what}, exact engine", ""]
        names = list(points[0])
        lines += [f"| {' | '.join(names)} |", f"|{'--:|' * len(names)}"]
        lines += [f"| {' | '.join(f'{point[name]:.4g}' for name in names)} |" for point in points]
        lines.append("")
    return lines
