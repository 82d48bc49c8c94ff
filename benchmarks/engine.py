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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity import Head, PairBatch, discovery_pairs, load_model, mean_head_outputs, path_patch
from tl_entity.errors import InputError
from tl_entity.exact.counts import (
    CircuitEvaluation,
    Job,
    PathPatching,
    cross_model_patching,
    mask_steps,
)
from tl_entity.exact.machine import calibrate
from tl_entity.exact.memory import memory_budget
from tl_entity.exact.precision import float32_matmul_precision
from tl_entity.heads import Circuit, HeadsAt
from tl_entity.hooks.edits import Hook, freeze_heads, patch_heads
from tl_entity.hooks.path_patching import Senders, _mlp_hook, _receiver_hooks
from tl_entity.hooks.points import HeadInput, hook_point, separate_kv_heads
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.circuits import BATCH_SIZE, evaluate_circuits
from tl_entity.methods.cmap import cmap_each
from tl_entity.methods.dcm import MaskedForward
from tl_entity.methods.path_patching import path_patch_mlps
from tl_entity.methods.plan import box_layout, entity_tracking_jobs, plan, spread_heads
from tl_entity.metrics import RELATIVE_PROBABILITY, log_probability
from tl_entity.models.registry import planted_circuit
from tl_entity.study.settings import Settings, resolve_sizes
from tl_entity.tasks.batches import PromptBatch

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

RANDOM: dict[str, dict[str, int]] = {
    "random-256": {"n_layers": 8, "d_model": 256, "n_heads": 8, "n_kv_heads": 8, "d_mlp": 704},
    "random-512": {"n_layers": 8, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_mlp": 1408},
    "random-1024": {"n_layers": 8, "d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "d_mlp": 2816},
    "random-llama-7b": {
        "n_layers": 32,
        "d_model": 4096,
        "n_heads": 32,
        "n_kv_heads": 32,
        "d_mlp": 11008,
        "d_vocab": 32000,
    },
}
"""Llamas of random weights, made on the device."""

HOOKS_AT_MOST = 12
"""Senders, circuits or choices that plain hooks run, where there are more."""

PLAIN_STEP = 4
"""Of the senders that plain hooks run, one in so many also with every token's logits."""

WHOLE_ON_HOOKS = 2e11
"""Plain hooks run everything where that is no more operations than this."""

Result = TypeVar("Result")


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


@dataclass(frozen=True)
class Engines:
    """A job on both engines.

    Attributes:
        exact: the exact engine's run; gives what is compared.
        job: what it computes, to be counted.
        pairs: the prompts it computes it for.
        hooks: plain hooks' run of the sample, or None; gives its set-up's seconds, the sample's
            seconds, and what is compared.
        plain: the same for a few, every token's logits being computed.
        n_all: how many senders plain hooks would have to run.
        n_run: how many of them the sample has.
        compared: picks from the exact engine's result what the sample has.
    """

    exact: Callable[[], Any]
    job: Job
    pairs: PairBatch
    hooks: Callable[[], tuple[float, float, Tensor]] | None
    n_all: int
    n_run: int
    compared: Callable[[Any], Tensor]
    plain: Callable[[], tuple[float, float, Tensor]] | None = None


class Clock:
    """Seconds: of the processor for one thread of a CPU, which other processes disturb least;
    of the wall clock otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_processor = device.type == "cpu" and torch.get_num_threads() == 1

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.of_processor else time.perf_counter()

    def timed(self, work: Callable[[], Result]) -> tuple[float, Result]:
        gc.collect()
        start = self.now()
        result = work()
        return self.now() - start, result


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


# ---------------------------------------------------------------------------------------- models


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
        count = both.job.count(model.cfg, both.pairs, memory)
        # Matrix products are timed beside the job that makes them: the machine's speed drifts.
        tally = count.tally
        where = {"device": model.cfg.device, "dtype": model.cfg.dtype}
        before = calibrate([tally], **where)
        row = time_job(job, both, clock, options.repetitions)
        after = before if options.quick else calibrate([tally], **where)
        operations = sum(tally.operations.values())
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


def model_and_pairs(name: str, options: argparse.Namespace) -> tuple[HookedTransformer, PairBatch]:
    """A model by name, folder, or as one of random weights, and its prompts."""
    if name in RANDOM:
        model = random_llama(RANDOM[name], options.device)
    else:
        model = load_model(name, device=options.device)
    return model, prompts_of(model, name, options.prompts, options.boxes)


def prompts_of(model: HookedTransformer, name: str, n_prompts: int, n_boxes: int) -> PairBatch:
    """Box prompts, or for a model of random weights random tokens of their form."""
    if name in RANDOM or model.tokenizer is None:
        return random_pairs(model, n_prompts, n_boxes)
    pairs = discovery_pairs(model.tokenizer, n_prompts, n_boxes=n_boxes, seed=0)
    return pairs.to(model.cfg.device or "cpu")


def llama_config(sizes: Mapping[str, int], device: str) -> HookedTransformerConfig:
    """The configuration of a Llama of some sizes."""
    n_heads, n_kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    d_head = sizes.get("d_head", sizes["d_model"] // n_heads)
    return HookedTransformerConfig(
        n_layers=sizes["n_layers"],
        d_model=sizes["d_model"],
        n_heads=n_heads,
        n_key_value_heads=None if n_kv_heads == n_heads else n_kv_heads,
        d_head=d_head,
        d_mlp=sizes["d_mlp"],
        d_vocab=sizes.get("d_vocab", 8192),
        n_ctx=512,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        default_prepend_bos=False,
        init_weights=False,
        device=device,
    )


def random_llama(sizes: Mapping[str, int], device: str, seed: int = 0) -> HookedTransformer:
    """A Llama of random weights, laid out in memory as a loaded checkpoint's are."""
    cfg = llama_config(sizes, device)
    # Only parameters are made later, in place, where they belong.
    with init_empty_weights(include_buffers=False):
        model = HookedTransformer(cfg, move_to_device=False)
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        weights = torch.empty(rows, columns, device=device)
        return weights.normal_(0, columns**-0.5, generator=generator)

    for name, parameter in list(model.named_parameters()):
        shape = parameter.shape
        if name.endswith(("W_Q", "W_K", "W_V")):
            heads, d_model, size = shape
            weights = matrix(heads * size, d_model).view(heads, size, d_model).transpose(1, 2)
        elif name.endswith("W_O"):
            heads, size, d_model = shape
            weights = matrix(d_model, heads * size).view(d_model, heads, size).permute(1, 2, 0)
        elif parameter.ndim == 2 and not name.endswith("W_E"):
            weights = matrix(shape[1], shape[0]).T
        elif parameter.ndim == 2:
            weights = matrix(*shape) * shape[1] ** 0.5
        else:
            weights = torch.full(shape, float("ln" in name), device=device)
        set_parameter(model, name, weights)
    model.to(device, print_details=False)
    return model.requires_grad_(False).eval()


def set_parameter(model: HookedTransformer, name: str, weights: Tensor) -> None:
    """Put weights, as they lie in memory, in a parameter's place."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    module.register_parameter(last, torch.nn.Parameter(weights, requires_grad=False))


def random_pairs(model: HookedTransformer, n_prompts: int, n_boxes: int) -> PairBatch:
    """Random tokens in the form of box prompts."""
    pairs = box_layout(n_prompts, n_boxes=n_boxes)
    generator = torch.Generator().manual_seed(0)

    def filled(batch: Any) -> Any:
        tokens = torch.randint(model.cfg.d_vocab, batch.tokens.shape, generator=generator)
        return replace(batch, tokens=tokens, answers=tokens[:, 0].clone())

    clean, corrupt = filled(pairs.clean), filled(pairs.corrupt)
    return PairBatch(clean, corrupt, clean.answers).to(model.cfg.device or "cpu")


def noisy_copy(model: HookedTransformer) -> HookedTransformer:
    """A model of the same sizes that computes something else: one per cent of noise on `W_O`."""
    with init_empty_weights(include_buffers=False):
        other = HookedTransformer(replace_config(model.cfg), move_to_device=False)
    generator = torch.Generator(model.W_E.device).manual_seed(1)
    for name, parameter in list(model.named_parameters()):
        weights = parameter.data
        if name.endswith("W_O"):
            noise = torch.empty_like(weights).normal_(generator=generator)
            weights = weights + 0.01 * weights.std() * noise
        set_parameter(other, name, weights)
    for here, there in zip(other.blocks, model.blocks, strict=True):
        for table in ("rotary_cos", "rotary_sin"):
            setattr(here.attn, table, getattr(there.attn, table))
    other.to(model.W_E.device, print_details=False)
    other.tokenizer = model.tokenizer
    return other.requires_grad_(False).eval()


def replace_config(cfg: HookedTransformerConfig) -> HookedTransformerConfig:
    return HookedTransformerConfig.from_dict({**cfg.to_dict(), "init_weights": False})


# ------------------------------------------------------------------------------------------ jobs


def engines_of(
    model: HookedTransformer,
    name: str,
    pairs: PairBatch,
    options: argparse.Namespace,
    clock: Clock,
) -> dict[str, Callable[[], Engines]]:
    """Every job of the benchmark on both engines, to be set up when its turn comes."""
    known = None if name in RANDOM else planted_circuit(name)
    circuit = None if known is None else Circuit.load(known)
    settings = Settings(base=name, tuned=None)
    sizes, counts = resolve_sizes(settings, model.cfg.n_layers * model.cfg.n_heads)
    if options.receivers:
        counts = dict(zip(counts, options.receivers, strict=True))

    def heads_of(group: str) -> tuple[Head, ...]:
        return spread_heads(model.cfg, counts[group]) if circuit is None else circuit[group]

    a, b, c = (heads_of(group) for group in counts)
    every = [Head(n, head) for n in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    batch = batch_for_masks(model, name, options)
    programme = entity_tracking_jobs(
        model.cfg, sizes=sizes, receivers=counts, circuits=100, batch_size=len(pairs)
    )
    drawn = programme["100 circuits"]
    assert isinstance(drawn, CircuitEvaluation)
    kept = drawn.circuits
    jobs: dict[str, Callable[[], Engines]] = {
        "logits": lambda: path_patching(model, pairs, clock, "last"),
        "q at last": lambda: path_patching(model, pairs, clock, "last", a, "q"),
        "k at last": lambda: path_patching(model, pairs, clock, "last", a, "k"),
        "v at query label": lambda: path_patching(model, pairs, clock, "query_label", b, "v"),
        "v at previous query label": lambda: path_patching(
            model, pairs, clock, "previous_query_label", c, "v"
        ),
        "logits, MLPs as senders": lambda: path_patching(
            model, pairs, clock, "last", senders="mlps"
        ),
        "mask step at last": lambda: mask_step(model, batch, clock, every, "last"),
        "mask step at query label": lambda: mask_step(model, batch, clock, every, "query_label"),
        "10 circuits": lambda: circuits(model, pairs, clock, kept[:10]),
        "100 circuits": lambda: circuits(model, pairs, clock, kept),
        "patching from another model": lambda: patching(model, pairs, clock, kept[0]),
    }
    if options.only:
        jobs = {job: both for job, both in jobs.items() if any(o in job for o in options.only)}
    if options.quick:
        jobs = {job: both for job, both in jobs.items() if job not in ("k at last", "100 circuits")}
    return jobs


def batch_for_masks(model: HookedTransformer, name: str, options: argparse.Namespace) -> PairBatch:
    """As many pairs as a step takes by default."""
    n = options.prompts if options.quick else max(BATCH_SIZE, options.prompts)
    return prompts_of(model, name, n, options.boxes)


def path_patching(
    model: HookedTransformer,
    pairs: PairBatch,
    clock: Clock,
    position: str,
    receivers: tuple[Head, ...] | None = None,
    receiver_input: HeadInput | None = None,
    *,
    senders: Senders = "heads",
) -> Engines:
    cfg = model.cfg
    top = cfg.n_layers if receivers is None else max(head.layer for head in receivers)
    n = cfg.n_heads if senders == "heads" else 1
    reaching = [Head(layer, head) for layer in range(top) for head in range(n)]
    job = PathPatching(position, receivers, receiver_input, senders)
    chosen = reaching
    count = job.count(cfg, pairs, memory_budget(cfg.device))
    if count.hooks_operations > WHOLE_ON_HOOKS and len(reaching) > HOOKS_AT_MOST:
        step = len(reaching) / HOOKS_AT_MOST
        chosen = [reaching[int((i + 0.5) * step)] for i in range(HOOKS_AT_MOST)]
    how: dict[str, Any] = {"receivers": receivers, "receiver_input": receiver_input}

    def exact() -> Tensor:
        if senders == "mlps":
            return path_patch_mlps(model, pairs, position=position, **how).per_example[:, None]
        return path_patch(model, pairs, position=position, **how).per_example

    return Engines(
        exact=exact,
        job=job,
        pairs=pairs,
        hooks=lambda: hooks_path_patching(model, pairs, clock, position, senders, chosen, **how),
        plain=lambda: hooks_path_patching(
            model, pairs, clock, position, senders, chosen[::PLAIN_STEP], every_logit=True, **how
        ),
        n_all=len(reaching),
        n_run=len(chosen),
        compared=lambda scores: torch.stack([scores[head.layer, head.head] for head in chosen]),
    )


@torch.no_grad()
def hooks_path_patching(
    model: HookedTransformer,
    pairs: PairBatch,
    clock: Clock,
    position: str,
    senders: Senders,
    chosen: Sequence[Head],
    *,
    receivers: tuple[Head, ...] | None,
    receiver_input: HeadInput | None,
    every_logit: bool = False,
) -> tuple[float, float, Tensor]:
    """What `tl_entity.hooks.path_patching.patched_values` does, for some senders only."""
    with separate_kv_heads(model) if receiver_input in ("k", "v") else nullcontext():
        layers = range(model.cfg.n_layers)
        sent = "z" if senders == "heads" else "mlp_out"
        answer = every_logit_of if every_logit else answer_logits

        def set_up() -> tuple[list[Hook], dict[str, Tensor], Tensor]:
            clean = record(model, pairs.clean, {hook_point("z", n): None for n in layers})
            corrupt = record(model, pairs.corrupt, {hook_point(sent, n): None for n in layers})
            held = freeze_heads(clean, pairs.clean, layers=layers, from_position=position)
            return held, corrupt, log_probability(answer_logits(model, pairs.clean), pairs.targets)

        once, (held, corrupt, clean_value) = clock.timed(set_up)

        def run_sender(head: Head) -> Tensor:
            if senders == "heads":
                heads = {position: [head]}
                sender = patch_heads(corrupt, heads, into=pairs.clean, source=pairs.corrupt)
            else:
                sender = [_mlp_hook(corrupt, head.layer, position, pairs)]
            hooks: list[Hook] = [*held, *sender]
            if receivers is not None and receiver_input is not None:
                hooks = _receiver_hooks(model, pairs, hooks, position, receivers, receiver_input)
            logits = answer(model, pairs.clean, hooks)
            value = log_probability(logits, pairs.targets)
            return RELATIVE_PROBABILITY.change(value, clean_value)

        seconds, scores = clock.timed(lambda: torch.stack([run_sender(head) for head in chosen]))
    return once, seconds, scores


def every_logit_of(model: HookedTransformer, prompts: PromptBatch, hooks: Sequence[Hook]) -> Tensor:
    """As `answer_logits`, in the way most code does it."""
    mask = prompts.mask.long()
    logits = model.run_with_hooks(prompts.tokens, attention_mask=mask, fwd_hooks=[*hooks])
    return logits[torch.arange(len(prompts)), prompts.position("last")]


def mask_step(
    model: HookedTransformer,
    pairs: PairBatch,
    clock: Clock,
    candidates: Sequence[Head],
    position: str,
) -> Engines:
    """One step, forward and backward, the recorded runs being there."""
    forwards = {
        engine: MaskedForward(model, candidates, position=position, engine=engine)
        for engine in ("exact", "hooks")
    }
    recorded = {engine: masked.record(pairs) for engine, masked in forwards.items()}

    def step(engine: str) -> Tensor:
        masked = forwards[engine]
        masked.mask.grad = None
        with torch.enable_grad():
            logits = masked.run(recorded[engine], masked.mask, tokens=pairs.targets[:, None])
            (-logits.mean()).backward()
        assert masked.mask.grad is not None
        return masked.mask.grad.detach().clone()

    def hooks() -> tuple[float, float, Tensor]:
        seconds, gradient = clock.timed(lambda: step("hooks"))
        return 0.0, seconds, gradient

    return Engines(
        exact=lambda: step("exact"),
        job=StepAlone(mask_steps(candidates, position=position, epochs=1, batch_size=len(pairs))),
        pairs=pairs,
        hooks=hooks,
        n_all=1,
        n_run=1,
        compared=lambda gradient: gradient,
    )


@dataclass(frozen=True)
class StepAlone(Job):
    """A mask's step without the recorded runs: what two steps take more than one."""

    steps: Any

    def count(self, cfg: HookedTransformerConfig, pairs: PairBatch, memory: int) -> Any:
        one, two = (replace(self.steps, times=times).count(cfg, pairs, memory) for times in (1, 2))
        two.tally.products.subtract(one.tally.products)
        two.tally.calls.subtract(one.tally.calls)
        two.tally.moved -= one.tally.moved
        return two


def circuits(
    model: HookedTransformer,
    pairs: PairBatch,
    clock: Clock,
    kept: tuple[Circuit | HeadsAt, ...],
) -> Engines:
    some = kept[: max(1, min(len(kept), HOOKS_AT_MOST // 3))]
    values = mean_head_outputs(model, pairs.corrupt, batch_size=len(pairs))

    def run_circuits(engine: Any, which: Sequence[Circuit | HeadsAt]) -> Tensor:
        found = evaluate_circuits(
            model,
            pairs.clean,
            which,
            mean_outputs=values,
            engine=engine,
            batch_size=len(pairs),
        )
        return torch.stack([evaluation.answer_log_probability for evaluation in found])

    def hooks() -> tuple[float, float, Tensor]:
        seconds, found = clock.timed(lambda: run_circuits("hooks", some))
        return 0.0, seconds, found

    return Engines(
        exact=lambda: run_circuits("exact", kept),
        job=CircuitEvaluation(kept, batch_size=len(pairs)),
        pairs=pairs,
        hooks=hooks,
        n_all=len(kept),
        n_run=len(some),
        compared=lambda found: found[: len(some)],
    )


def patching(
    model: HookedTransformer, pairs: PairBatch, clock: Clock, heads: Circuit | HeadsAt
) -> Engines:
    """Outputs, queries, keys and values of each position's heads, and of all of them."""
    other = noisy_copy(model)
    assert not isinstance(heads, Circuit)
    parts: list[HeadsAt] = [*({at: some} for at, some in heads.items()), heads]
    choices = [(part, patch) for patch in ("output", "q", "k", "v") for part in parts]
    some = choices[:: max(1, len(choices) // (HOOKS_AT_MOST // 2))]

    def run_choices(engine: Any, which: Sequence[tuple[Circuit | HeadsAt, str]]) -> Tensor:
        found = cmap_each(model, other, pairs.clean, which, engine=engine, batch_size=len(pairs))
        return torch.stack([evaluation.answer_log_probability for evaluation in found])

    def hooks() -> tuple[float, float, Tensor]:
        # The other model's run is shared by all choices, so it is no part of what is scaled up.
        alone, _ = clock.timed(lambda: run_choices("hooks", some[:1]))
        seconds, found = clock.timed(lambda: run_choices("hooks", some))
        each = (seconds - alone) / max(1, len(some) - 1)
        return max(0.0, alone - each), each * len(some), found

    index = [choices.index(choice) for choice in some]
    return Engines(
        exact=lambda: run_choices("exact", choices),
        job=cross_model_patching(choices, batch_size=len(pairs)),
        pairs=pairs,
        hooks=hooks,
        n_all=len(choices),
        n_run=len(some),
        compared=lambda found: found[index],
    )


# ---------------------------------------------------------------------------------------- memory


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


# ---------------------------------------------------------------------------------------- growth


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
                count = both.job.count(model.cfg, pairs, memory_budget(model.cfg.device))
                point[f"{stage}, seconds"] = seconds
                point[f"{stage}, gflop"] = sum(count.tally.operations.values()) / 1e9
            found[what].append(point)
        _note(f"growth with {what}: done")
    return found


# ----------------------------------------------------------------------------------------- table


def write_table() -> None:
    """Write docs/benchmarks.md from the JSON files there are."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise InputError(f"There is no JSON file in {RESULTS.name}; run the benchmark first.")
    lines = [INTRODUCTION]
    for file in files:
        lines += _tables(json.loads(file.read_text(encoding="utf-8")))
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
- The logits stage was asked to be 80 times faster than plain hooks. It is beside `run_with_hooks`
  (plain / exact), and not beside our own hooks engine, which spares the logits that nobody reads.
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
        "Not measured: no card was at hand. Counted from shapes, as `tl-entity plan` does it: 32",
        "layers of 32 heads, 300 prompts of 53 tokens, 20, 5 and 10 receivers, spread over the",
        "upper half of the layers.",
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


# --------------------------------------------------------------------------------------- the rest


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


def title(name: str) -> str:
    """A model's name without its place on this machine."""
    return name if name in RANDOM else Path(name).name


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
