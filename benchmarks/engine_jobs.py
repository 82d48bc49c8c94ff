"""The jobs that are timed, each on the exact engine and on plain hooks."""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from engine_models import RANDOM, noisy_copy, prompts_of
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity import Head, PairBatch, mean_head_outputs, path_patch
from tl_entity.exact.memory import memory_budget
from tl_entity.heads import Circuit, HeadsAt
from tl_entity.hooks.edits import Hook, freeze_heads, patch_heads
from tl_entity.hooks.path_patching import Path, Senders, _mlp_hook, _receiver_hooks
from tl_entity.hooks.points import HeadInput, hook_point, separate_kv_heads
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.circuits import BATCH_SIZE, evaluate_circuits
from tl_entity.methods.cmap import cmap_each
from tl_entity.methods.masked_forward import MaskedForward
from tl_entity.methods.path_patching import path_patch_mlps
from tl_entity.metrics import RELATIVE_PROBABILITY, log_probability
from tl_entity.models.registry import planted_circuit
from tl_entity.planning.jobs import (
    CircuitEvaluation,
    Job,
    PathPatching,
    cross_model_patching,
    mask_steps,
)
from tl_entity.planning.plan import entity_tracking_jobs, spread_heads
from tl_entity.study.settings import Settings, resolve_sizes
from tl_entity.tasks.batches import PromptBatch

HOOKS_AT_MOST = 12
"""Senders, circuits or choices that plain hooks run, where there are more."""

PLAIN_STEP = 4
"""Of the senders that plain hooks run, one in so many also with every token's logits."""

WHOLE_ON_HOOKS = 2e11
"""Plain hooks run everything where that is no more operations than this."""

Result = TypeVar("Result")


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
    count = job.count(model, pairs, memory_budget(cfg.device))
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
                path = Path(senders, position, {receiver_input: receivers})
                hooks = _receiver_hooks(model, pairs, hooks, path)
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

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        return self.steps.run(model, pairs, memory)

    def count(self, like: Any, pairs: PairBatch, memory: int) -> Any:
        one, two = (replace(self.steps, epochs=n).count(like, pairs, memory) for n in (1, 2))
        return two._replace(tally=two.tally - one.tally)


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
