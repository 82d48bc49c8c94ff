"""Cross-model activation patching: which heads bring what fine-tuning gained (Prakash et al. 2024,
§5)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.cross_model import (
    check_same_architecture,
    input_hooks,
    input_points,
)
from tl_entity.hooks.edits import patch_heads
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import HookFunction, record
from tl_entity.hooks.vocabulary import check_prompts
from tl_entity.methods.circuits import Evaluation, evaluate, evaluate_each
from tl_entity.methods.cross_model_patching import NO_SHARE as NO_SHARE
from tl_entity.methods.cross_model_patching import OUTPUT as OUTPUT
from tl_entity.methods.cross_model_patching import PATCHES as PATCHES
from tl_entity.methods.cross_model_patching import WHOLE_CIRCUIT as WHOLE_CIRCUIT
from tl_entity.methods.cross_model_patching import CrossModelPatching as CrossModelPatching
from tl_entity.methods.cross_model_patching import Patched as Patched
from tl_entity.methods.gains import recovered_gain
from tl_entity.metrics import Metric
from tl_entity.runs.runner import Runner, RunSettings, no_progress
from tl_entity.runs.variants import Edits
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    pass


@checked
def cmap(
    base: Model,
    tuned: Model,
    prompts: PromptBatch,
    heads: Circuit | HeadsAt,
    *,
    patch: str = OUTPUT,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> Evaluation:
    """Answer the prompts with the base model, some heads taking what the tuned model computes on
    the same prompts.

    With `patch="output"`, the heads' `hook_z` at their position is the tuned model's, and all that
    comes after is recomputed. With letters of q, k and v, the head's output at its position p is
    sum_j softmax_j(q[p] · k[j] / scale) v[j] over the tokens j it reads, 0 to p, where the vectors
    of the letters named are the tuned model's, for this head alone (under grouped-query attention
    its siblings keep theirs), and the others are what the patched run itself computes there. The
    head's output at other tokens is not touched. So "qkv" is the same as "output".

    Args:
        base: the model that answers.
        tuned: the model that activations are taken from; swap the two for the other direction.
        prompts: the prompts of both runs.
        heads: a circuit, or heads by named position.
        patch: "output", or any of the letters q, k, v, such as "q" or "qk".
        metric: what is read off the answers besides, as in `evaluate`.
        how: engine, batch_size, memory, progress, ranks or runner: see `Runner`. "exact" recomputes
            only what the patch can change; "hooks" runs the whole model.

    Raises:
        InputError: if the models differ in architecture or tokenizer, naming what differs; a head
            or position does not exist; a prompt has no answer or a token that a model does not
            know; `patch` is something else; hooks are attached to a model; or the exact engine does
            not fit the base model.
        NotFiniteError: if weights, activations or logits are NaN or infinite, naming where.
    """
    (found,) = cmap_each(base, tuned, prompts, [(heads, patch)], metric=metric, **how)
    return found


@checked
@torch.no_grad()
def cmap_each(
    base: Model,
    tuned: Model,
    prompts: PromptBatch,
    choices: Sequence[tuple[Circuit | HeadsAt, str]],
    *,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> list[Evaluation]:
    """`cmap` of several choices of heads and of what is patched, one after another.

    The run of the tuned model is shared by all, and on the exact engine that of the base too.

    Args:
        base: as in `cmap`.
        tuned: as in `cmap`.
        prompts: as in `cmap`.
        choices: heads and what of them is patched; each by itself.
        metric: as in `cmap`.
        how: as in `cmap`. One choice on one prompt is a run.

    Raises:
        InputError: as `cmap`.
    """
    check_same_architecture(base, tuned)
    known, most = sorted((base.cfg.d_vocab, tuned.cfg.d_vocab))
    alone = prompts.mask & (prompts.tokens >= known) & (prompts.tokens < most)
    if bool(alone.any()):
        row, at = alone.nonzero()[0].tolist()
        raise InputError(
            f"Prompt {row} has at {at} the token {int(prompts.tokens[row, at])}, which only one of "
            f"the models knows ({known} or up)."
        )
    check_prompts(base, prompts, answered=True)
    chosen = [
        ({at: some for at, some in heads_by_position(heads).items() if some}, patch)
        for heads, patch in choices
    ]
    points: dict[str, str | None] = {}
    for heads, patch in chosen:
        flat = [head for some in heads.values() for head in some]
        check_heads(base, flat)
        points |= _points(flat, patch, base)

    def edits_of(chunk: PromptBatch) -> list[Edits]:
        seen = record(tuned, chunk.to(tuned.cfg.device or "cpu"), points) if points else {}
        cache = {name: some.to(base.cfg.device or "cpu") for name, some in seen.items()}
        return [_edits(cache, base, chunk, heads, patch) for heads, patch in chosen]

    with guarded(base, tuned):
        return evaluate_each(base, prompts, edits_of, Runner.of(**how), metric)


@checked
def cmap_by_group(
    base: Model,
    tuned: Model,
    prompts: PromptBatch,
    circuit: Circuit,
    *,
    seed: int | None = None,
    patches: Sequence[str] = PATCHES,
    **how: Unpack[RunSettings],
) -> CrossModelPatching:
    """Patch every group of a circuit by itself, and all of them together.

    For the other direction swap the models; for a control take a third model as `tuned`.

    Args:
        base: the model that answers.
        tuned: the model that activations are taken from.
        prompts: the prompts of both.
        circuit: the groups of heads; for what the paper patched, the tuned model's own circuit with
            each group cut down to the heads that DCM selected (`Circuit.restrict`).
        seed: taken so that calls from before still run; nothing is drawn.
        patches: what is patched, as in `cmap`.
        how: as in `cmap`. One group and patch on one prompt is a run; there are
            len(patches) * (number of groups + 1) * len(prompts).

    Raises:
        InputError: as `cmap`.
    """
    parts: list[tuple[str, Mapping[str, tuple[Head, ...]]]] = [
        (group.name, {group.position: group.heads}) for group in circuit
    ]
    parts.append((WHOLE_CIRCUIT, circuit.heads_at()))
    named = [(name, heads, patch) for patch in patches for name, heads in parts]
    choices = [(heads, patch) for _, heads, patch in named]
    found = cmap_each(base, tuned, prompts, choices, **how)
    quiet = replace(Runner.of(**how), progress=no_progress)
    alone, target = (evaluate(model, prompts, runner=quiet) for model in (base, tuned))
    return CrossModelPatching(
        alone,
        target,
        tuple(
            _patched(name, patch, heads, evaluation, alone, target)
            for (name, heads, patch), evaluation in zip(named, found, strict=True)
        ),
    )


def _patched(
    name: str,
    patch: str,
    heads: Mapping[str, tuple[Head, ...]],
    evaluation: Evaluation,
    base: Evaluation,
    tuned: Evaluation,
) -> Patched:
    found = recovered_gain(evaluation, base, tuned)
    return Patched(
        group=name,
        patch=patch,
        heads=heads,
        evaluation=evaluation,
        gain=found.gain,
        gain_interval=found.gain_interval,
        recovered=found.recovered,
        recovered_interval=found.recovered_interval,
    )


def _points(heads: Sequence[Head], patch: str, base: Model) -> dict[str, str | None]:
    """What must be recorded in the tuned model's run."""
    if patch == OUTPUT:
        return {hook_point("z", head.layer): None for head in heads}
    if not patch or len(set(patch)) != len(patch) or not set(patch) <= set("qkv"):
        raise InputError(
            f"{patch!r} can't be patched: say 'output', or different letters of q, k and v."
        )
    return input_points(heads, patch, base)


def _edits(
    cache: Mapping[str, Tensor],
    base: Model,
    prompts: PromptBatch,
    heads: HeadsAt,
    patch: str,
) -> list[tuple[str, HookFunction]]:
    if patch == OUTPUT:
        return [*patch_heads(cache, heads, into=prompts)]
    return input_hooks(cache, base, prompts, heads, inputs=patch)
