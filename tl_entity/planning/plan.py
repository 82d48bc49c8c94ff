"""A plan before a long run: operations, memory and time of each job on this machine."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.memory import memory_budget
from tl_entity.heads import Head, HeadsAt
from tl_entity.hooks.points import HeadInput, n_kv_heads
from tl_entity.methods.circuits import BATCH_SIZE
from tl_entity.methods.cmap import PATCHES
from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES, Stage
from tl_entity.models.checkpoint import folder_checkpoint
from tl_entity.models.config import hooked_config
from tl_entity.models.gguf_file import gguf_checkpoint
from tl_entity.models.hub import TOKENIZER_FILES, find_folder
from tl_entity.models.load import DTYPES, usable_device
from tl_entity.models.registry import locate
from tl_entity.models.tokenizers import fit_to_vocabulary
from tl_entity.planning.jobs import (
    CircuitEvaluation,
    Job,
    PathPatching,
    cross_model_patching,
    knockouts,
    mask_steps,
)
from tl_entity.planning.jobs_planned import Plan as Plan
from tl_entity.planning.jobs_planned import PlannedJob as PlannedJob
from tl_entity.planning.machine import calibrate
from tl_entity.planning.meta import Stand
from tl_entity.planning.operations import Tally
from tl_entity.tasks.batches import PairBatch, PromptBatch

if TYPE_CHECKING:
    pass

SEGMENT_TOKENS, QUESTION_TOKENS = 7, 4
"""Tokens of `the apple is in Box E,` and of `Box Q contains the`, where a tokenizer is not at hand:
one for each word and mark."""


@checked
def plan(
    model: HookedTransformer | HookedTransformerConfig,
    pairs: PairBatch,
    jobs: Mapping[str, Job],
    *,
    memory: int | None = None,
    timed: bool = True,
) -> Plan:
    """Count what jobs take on the exact engine, and estimate how long they take on this machine.

    The engine itself is run, on a model without weights, and its operations and the memory of its
    tensors are noted. Seconds come from a calibration of about a second, which times operations of
    the kinds that were counted, and small calls, by the processor's time: other processes do not
    count. They are for the device of the model or configuration, at torch's present number of
    threads.

    Args:
        model: the model, or just its configuration.
        pairs: the prompts, or any of their form: only lengths and named positions are read.
        jobs: what is to be run, by name (`tl_entity.planning.jobs`, or `entity_tracking_jobs`).
        memory: bytes that intermediate results may take; found from the device if left out.
        timed: whether to calibrate.

    Raises:
        InputError: if there are no jobs, the prompts lack a position, or the model a head.
    """
    cfg = model.cfg if isinstance(model, HookedTransformer) else model
    if not jobs:
        raise InputError("There is nothing to plan: name at least one job.")
    n_tokens = pairs.clean.tokens.shape[1]
    if n_tokens > cfg.n_ctx:
        raise InputError(f"The model takes prompts of {cfg.n_ctx} tokens; these have {n_tokens}.")
    memory = memory_budget(cfg.device) if memory is None else memory
    stand = Stand.of(model, max(n_tokens, pairs.corrupt.tokens.shape[1]))
    counts = {name: job.count(stand, pairs, memory) for name, job in jobs.items()}
    machine = None
    if timed:
        tallies = [count.tally for count in counts.values()]
        machine = calibrate(tallies, device=cfg.device, dtype=cfg.dtype)

    def seconds(tally: Tally) -> float | None:
        return None if machine is None else machine.seconds(tally)

    parameters = n_parameters(cfg)
    return Plan(
        jobs=tuple(
            PlannedJob(
                name=name,
                operations=count.tally.operations,
                cache_bytes=count.cache_bytes,
                chunk_bytes=count.chunk_bytes,
                hooks_passes=count.hooks_passes,
                hooks_operations=count.hooks_operations,
                seconds=seconds(count.tally),
            )
            for name, count in counts.items()
        ),
        n_prompts=len(pairs),
        n_tokens=n_tokens,
        parameters=parameters,
        weight_bytes=parameters * cfg.dtype.itemsize,
        dtype=str(cfg.dtype).removeprefix("torch."),
        machine=machine,
    )


@checked
def read_configuration(
    name_or_path: str, *, dtype: str = "float32", device: str | None = None
) -> tuple[HookedTransformerConfig, PreTrainedTokenizerBase | None]:
    """A model's configuration and tokenizer, without its weights, which need not even be there.

    Args:
        name_or_path: as in `load_model`.
        dtype: as in `load_model`.
        device: as in `load_model`.

    Returns:
        The configuration, and the tokenizer if there is one.

    Raises:
        InputError: if there is no configuration, or it can't be represented exactly; if the
            tokenizer is another model's.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is none of {', '.join(DTYPES)}.")
    local = locate(name_or_path)
    if local is not None and local.suffix == ".gguf" and local.is_file():
        checkpoint = gguf_checkpoint(local)
    else:
        checkpoint = folder_checkpoint(find_folder(name_or_path, TOKENIZER_FILES))
    cfg = hooked_config(
        checkpoint.config,
        dtype=DTYPES[dtype],
        device=usable_device(device, 1),
        place=checkpoint.place,
    )
    tokenizer = checkpoint.tokenizer()
    if tokenizer is not None:
        fit_to_vocabulary(tokenizer, cfg.d_vocab, f"The tokenizer of {checkpoint.place}")
    return cfg, tokenizer


@checked
def entity_tracking_jobs(
    cfg: HookedTransformerConfig,
    *,
    sizes: Mapping[str, int],
    receivers: Mapping[str, int | Sequence[Head]],
    circuits: int = 10,
    stages: Sequence[Stage] = ENTITY_TRACKING_STAGES,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Job]:
    """The paper's program as jobs: a path patching for each group, F(C) of some circuits, a mask's
    training over all heads of a group's position, patching the circuit from another model, and
    attention knockout.

    Args:
        cfg: the model's configuration.
        sizes: heads in each group.
        receivers: of each group that a later one is found by, the heads patched into; or, before
            they are known, how many. These are then taken to be spread over the upper half of the
            layers; the lower they really are, the more there is to compute.
        circuits: how many circuits are evaluated; their heads are drawn at random.
        stages: what is found, and how.
        batch_size: prompts run together in all but path patching.

    Raises:
        InputError: if a group has no size, or its receivers are not given.
    """
    jobs: dict[str, Job] = {}
    for stage in stages:
        if stage.group not in sizes:
            raise InputError(f"Say how many heads the group {stage.group} has.")
        by_input: dict[HeadInput, tuple[Head, ...]] = {}
        for group, which in stage.into_inputs:
            if group not in receivers:
                raise InputError(f"Say how many heads of {group} are patched into.")
            known = receivers[group]
            heads = spread_heads(cfg, known) if isinstance(known, int) else tuple(known)
            by_input[which] = tuple(dict.fromkeys((*by_input.get(which, ()), *heads)))
        senders = "mlps" if stage.mlps else "heads"
        if len(by_input) <= 1:
            which, heads = next(iter(by_input.items()), (None, None))
            job = PathPatching(stage.position, heads, which, senders)
        else:
            job = PathPatching(stage.position, by_input, senders=senders)
        jobs[f"path patching, {stage.group}"] = job
    generator = np.random.default_rng(0)
    drawn = tuple(_random_heads(cfg, sizes, stages, generator) for _ in range(max(1, circuits)))
    jobs[f"{circuits} circuits"] = CircuitEvaluation(drawn[:circuits], batch_size)
    every = [Head(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    for position in dict.fromkeys(stage.position for stage in stages):
        jobs[f"mask training, {position}"] = mask_steps(
            every, position=position, batch_size=batch_size
        )
    parts: list[HeadsAt] = [*({at: heads} for at, heads in drawn[0].items()), drawn[0]]
    choices = [(heads, patch) for patch in PATCHES for heads in parts]
    jobs["patching from another model"] = cross_model_patching(choices, batch_size=batch_size)
    jobs["attention knockout"] = knockouts(
        cfg, from_position=stages[0].position, batch_size=batch_size
    )
    return jobs


@checked
def spread_heads(cfg: HookedTransformerConfig, n_heads: int) -> tuple[Head, ...]:
    """Heads evenly over the upper half of the layers.

    Raises:
        InputError: if there are not so many.
    """
    lowest = cfg.n_layers // 2
    layers = cfg.n_layers - lowest
    if not 1 <= n_heads <= layers * cfg.n_heads:
        raise InputError(
            f"{n_heads} heads can't be patched into: the upper half of the model has "
            f"{layers * cfg.n_heads}, and at least one is needed."
        )
    heads: list[Head] = []
    for i in range(n_heads):
        layer = lowest + int((i + 0.5) * layers / n_heads)
        heads.append(Head(layer, sum(head.layer == layer for head in heads)))
    return tuple(heads)


@checked
def box_layout(n_prompts: int, *, n_boxes: int = 7, seed: int = 0) -> PairBatch:
    """Pairs of the form that box prompts have where every word and mark is a token; the tokens
    themselves are all zero.

    Raises:
        InputError: if no prompt or no box is asked for.
    """
    if n_prompts < 1 or n_boxes < 1:
        raise InputError(f"{n_prompts} prompts of {n_boxes} boxes: ask for at least one of each.")
    generator = random.Random(seed)
    length = SEGMENT_TOKENS * n_boxes + QUESTION_TOKENS
    asked = torch.tensor([generator.randrange(n_boxes) for _ in range(n_prompts)])
    zeros = torch.zeros(n_prompts, dtype=torch.long)
    positions = {
        "last": zeros + length - 1,
        "query_label": zeros + length - 3,
        "previous_query_label": SEGMENT_TOKENS * asked + 5,
        "correct_object": SEGMENT_TOKENS * asked + 1,
    }
    batch = PromptBatch(zeros[:, None].expand(-1, length), zeros, positions)
    return PairBatch(batch, batch, zeros)


@checked
def n_parameters(cfg: HookedTransformerConfig) -> int:
    """Numbers in the weights of a Llama-like model of this configuration, biases left out."""
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + n_kv_heads(cfg))
    mlp = 3 * cfg.d_model * (cfg.d_mlp or 4 * cfg.d_model)
    embeddings = (1 if getattr(cfg, "tie_word_embeddings", False) else 2) * cfg.d_vocab
    return (
        cfg.n_layers * (attention + mlp + 2 * cfg.d_model) + embeddings * cfg.d_model + cfg.d_model
    )


def _random_heads(
    cfg: HookedTransformerConfig,
    sizes: Mapping[str, int],
    stages: Sequence[Stage],
    generator: np.random.Generator,
) -> HeadsAt:
    """Heads of the groups' sizes at the groups' positions, none twice at a position."""
    total = cfg.n_layers * cfg.n_heads
    heads: dict[str, list[Head]] = {}
    for position in dict.fromkeys(stage.position for stage in stages):
        n = min(total, sum(sizes[stage.group] for stage in stages if stage.position == position))
        drawn = generator.choice(total, n, replace=False)
        heads[position] = [Head(*divmod(int(index), cfg.n_heads)) for index in drawn]
    return heads
