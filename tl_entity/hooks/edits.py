"""Typed hook functions: what is edited, at which hook point, and where in each prompt.

Each edit is a frozen dataclass that TransformerLens calls as `edit(activation, hook)`. The builders
return `(hook point name, edit)` pairs, ready for `model.run_with_hooks(tokens, fwd_hooks=...)`:

    hooks = patch_heads(cache, {"last": [Head(10, 3)]}, into=batch)
    model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.edit_functions import AblateWhere as AblateWhere
from tl_entity.hooks.edit_functions import KnockOutAttention as KnockOutAttention
from tl_entity.hooks.edit_functions import MaskHeads as MaskHeads
from tl_entity.hooks.edit_functions import ReplaceHeads as ReplaceHeads
from tl_entity.hooks.edit_functions import ReplaceToken as ReplaceToken
from tl_entity.hooks.edit_functions import ReplaceWhere as ReplaceWhere
from tl_entity.hooks.points import hook_point
from tl_entity.tasks.batches import PromptBatch

Cache = Mapping[str, Tensor]
"""Activations by hook point name, such as `run_with_cache` returns."""


Edit = ReplaceHeads | ReplaceToken | ReplaceWhere | AblateWhere | MaskHeads | KnockOutAttention
Hook = tuple[str, Edit]
"""A hook point's full name and the edit made there."""


@checked
def patch_heads(
    cache: Cache,
    heads: Circuit | HeadsAt,
    *,
    into: PromptBatch,
    source: PromptBatch | None = None,
    point: str = "z",
) -> list[Hook]:
    """Hooks that give heads, at named positions, the vectors they have in another run.

    The other run may be of other prompts (activation patching) or of another model on the same
    prompts (cross-model patching): all that counts is its cache.

    Args:
        cache: activations of the other run; only `point` of the layers concerned is read.
        heads: which heads at which named position; query heads at z and q, entries of the head axis
            at k and v.
        into: the prompts of the run to be patched.
        source: the prompts of the other run, whose own named positions are read; `into` itself if
            left out.
        point: z, q, k or v.

    Raises:
        InputError: if the cache lacks a hook point, holds another number of prompts or positions,
            or has no such head, or a named position is missing.
    """
    source = into if source is None else source
    hooks: list[Hook] = []
    for position, at in heads_by_position(heads).items():
        read, write = source.position(position), into.position(position)
        for layer, indices in _by_layer(at).items():
            name = hook_point(point, layer)
            activation = _cached(cache, name, source)
            for index in indices:
                if not 0 <= index < activation.shape[2]:
                    raise InputError(
                        f"The cache of {name} has {activation.shape[2]} heads; "
                        f"{Head(layer, index)} is to be patched."
                    )
            chosen = torch.tensor(indices)
            rows = torch.arange(len(source), device=activation.device)[:, None]
            values = activation[
                rows,
                read.to(activation.device)[:, None],
                chosen.to(activation.device),
            ]
            hooks.append((name, ReplaceHeads(write, chosen, values)))
    return hooks


@checked
def freeze_heads(
    cache: Cache, prompts: PromptBatch, *, layers: Sequence[int], from_position: str | None = None
) -> list[Hook]:
    """Hooks that hold every head's `hook_z` at its cached value, so that attention passes no change
    on; MLPs and norms are still recomputed.

    Args:
        cache: the clean run of the same prompts.
        prompts: the prompts, for their positions.
        layers: the layers held.
        from_position: hold only the tokens from this named position to `"last"`; all if left out.

    Raises:
        InputError: if the cache lacks a layer or was made of other prompts.
    """
    tokens = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    held = torch.ones_like(prompts.mask)
    if from_position is not None:
        held = tokens >= prompts.position(from_position)[:, None]
        held = held & (tokens <= prompts.position("last")[:, None])
    names = [hook_point("z", layer) for layer in layers]
    return [(name, ReplaceWhere(held[..., None], _cached(cache, name, prompts))) for name in names]


@checked
def ablate_heads(
    values: Ablation | Float[Tensor, "layer pos head d_head"],
    prompts: PromptBatch,
    *,
    keep: Circuit | HeadsAt | None = None,
    remove: Circuit | HeadsAt | None = None,
) -> list[Hook]:
    """Hooks that replace heads' `hook_z` by what an ablation leaves.

    With `keep`, every head is ablated at every token, except the kept heads at their own tokens.
    With `remove`, the removed heads are ablated at their own tokens (also if kept, by whatever
    name). Padding is left alone.

    Args:
        values: an ablation, or outputs by token index, such as `mean_head_outputs` makes.
        prompts: the prompts that will be run.
        keep: heads by named position, or by role at all of its tokens.
        remove: the same.

    Raises:
        InputError: if neither is given, the ablation does not fit the prompts, or a named position,
            role or head does not exist.
    """
    if keep is None and remove is None:
        raise InputError("Say which heads to keep or which to remove.")
    ablation = Ablation.of(values)
    rows = ablation.rows(prompts)
    if ablation.outputs is None:
        raise InputError("Give the zero ablation its model's shape first: ablation.of_model(cfg).")
    n_layers, _, n_heads, _ = ablation.outputs.shape
    where = torch.full((n_layers, *prompts.tokens.shape, n_heads), keep is not None)
    for ablated, at_names in ((False, keep), (True, remove)):
        for name, heads in heads_by_position(at_names).items():
            # A group without heads may be at a token that these prompts don't have.
            tokens = prompts.where(name).cpu() if heads else None
            for head in heads:
                if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
                    raise InputError(
                        f"The ablation values have no head {head}: "
                        f"{n_layers} layers of {n_heads} heads."
                    )
                assert tokens is not None
                where[head.layer, ..., head.head].masked_fill_(tokens, ablated)
    where &= prompts.mask.cpu()[None, :, :, None]
    return [
        (hook_point("z", layer), AblateWhere(where[layer], rows, ablation.outputs[layer]))
        for layer in range(n_layers)
        if bool(where[layer].any())
    ]


@checked
def mask_heads(
    cache: Cache,
    heads: HeadsAt,
    masks: Mapping[str, Tensor],
    *,
    into: PromptBatch,
    source: PromptBatch,
) -> list[Hook]:
    """Hooks that mix heads' `hook_z` with another run's, each by its own trainable mask.

    Args:
        cache: activations of the counterfactual run.
        heads: candidate heads by named position.
        masks: for each named position a float vector, one entry for each of its heads in order.
        into: the prompts of the run with the mask.
        source: the counterfactual prompts, whose own positions are read.

    Raises:
        InputError: if masks and heads do not fit, or as `patch_heads`.
    """
    hooks: list[Hook] = []
    for position, at in heads_by_position(heads).items():
        if position not in masks or masks[position].shape != (len(at),):
            raise InputError(f"The mask at {position!r} must have one entry for each of its heads.")
        for layer, indices in _by_layer(at).items():
            which = torch.tensor([at.index(Head(layer, index)) for index in indices])
            patch = {position: [Head(layer, index) for index in indices]}
            ((name, replace),) = patch_heads(cache, patch, into=into, source=source)
            assert isinstance(replace, ReplaceHeads)
            mask = masks[position][which.to(masks[position].device)]
            hooks.append((name, MaskHeads(replace.positions, replace.heads, mask, replace.values)))
    return hooks


@checked
def knock_out(
    prompts: PromptBatch,
    *,
    from_position: str,
    to_position: str,
    layers: Sequence[int],
    heads: Sequence[Head] | None = None,
) -> list[Hook]:
    """Hooks by which one named token no longer sees another, in every head of the given layers, or
    only in `heads` of them (attention knockout; Prakash et al. 2024, appendix).

    Raises:
        InputError: if a position is missing, or the key token comes after the query token.
    """
    seer, seen = prompts.position(from_position), prompts.position(to_position)
    if bool((seen > seer).any()):
        raise InputError(
            f"{to_position!r} comes after {from_position!r} in a prompt, which never sees it."
        )
    hooks: list[Hook] = []
    for layer in layers:
        chosen = None if heads is None else tuple(h.head for h in heads if h.layer == layer)
        if chosen != ():
            hooks.append((hook_point("attn_scores", layer), KnockOutAttention(seer, seen, chosen)))
    return hooks


def _by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for head in heads:
        layers.setdefault(head.layer, []).append(head.head)
    return layers


def _cached(cache: Cache, name: str, prompts: PromptBatch) -> Tensor:
    if name not in cache:
        raise InputError(f"The cache lacks {name}; record it in the run to be read.")
    activation = cache[name]
    if activation.ndim != 4 or activation.shape[:2] != prompts.tokens.shape:
        raise InputError(
            f"The cache of {name} has shape {tuple(activation.shape)}, "
            f"which is not of prompts with tokens {tuple(prompts.tokens.shape)}."
        )
    return activation
