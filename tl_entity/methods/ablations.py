"""Making ablations: what heads and MLPs put out on other prompts, by role or by token index."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.ranks import gathered, share_of, summed
from tl_entity.tasks.batches import PromptBatch

BATCH_SIZE = 32
"""Prompts run together where nothing else is said."""


@checked
@torch.no_grad()
def pooled_ablation(
    model: Model, prompts: PromptBatch, *, mlps: bool = False, batch_size: int = BATCH_SIZE
) -> Ablation:
    """Ablate to the mean over all tokens of the same role, in all prompts.

    It leaves of a head's output what all tokens of the role have in common: not which segment a
    label stands in, nor which label it is. With prompts of one form, the mean over the paper's
    token indices leaves the former.

    Args:
        model: the model.
        prompts: other prompts of the same form as those to be ablated, with roles.
        mlps: also record what MLPs put out, so that they can be ablated too.
        batch_size: prompts run together.

    Raises:
        InputError: if the prompts have no roles.
    """
    roles = _roles(prompts)
    prompts = prompts.to(model.cfg.device or "cpu")
    counts = torch.stack([(roles == role).sum() for role in range(len(prompts.role_names))])
    present = counts.nonzero()[:, 0]
    number = torch.full((len(counts) + 1,), -1)
    number[present] = torch.arange(len(present))
    sums: dict[str, Tensor] = {}
    share = share_of(len(prompts))
    for chunk in prompts[share.rows].chunks(batch_size):
        row = number[_roles(chunk)].flatten()
        # A process without a share of its own runs a prompt that does not count.
        there = ((row >= 0) & (share.n > 0)).nonzero()[:, 0]
        for name, outputs in record(model, chunk, _points(model, mlps)).items():
            flat = outputs.flatten(0, 1).flatten(1).to(torch.float64)
            at = there.to(flat.device)
            if name not in sums:
                sums[name] = flat.new_zeros(len(present), flat.shape[1])
            sums[name].index_add_(0, row[there].to(flat.device), flat[at])
    n = counts[present][:, None]
    means = {name: summed(total) / n.to(total.device) for name, total in sums.items()}
    heads, of_mlps = _tables(model, means)
    return Ablation(
        kind="pooled",
        outputs=heads,
        mlp_outputs=of_mlps,
        role_names=tuple(prompts.role_names[role] for role in present.tolist()),
        row_roles=torch.arange(len(present)),
    )


@checked
@torch.no_grad()
def resample_ablation(
    model: Model,
    prompts: PromptBatch,
    *,
    seed: int,
    mlps: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Ablation:
    """Ablate to the output at a token of the same role, drawn from another prompt.

    Every token to be ablated draws one token, for all heads of all layers, so that outputs go
    together as they do in the model. A prompt draws the same tokens whatever batch it stands in,
    and never its own.

    All outputs of the prompts are kept: `n_layers * n_heads * d_head` numbers a token.

    Args:
        model: the model.
        prompts: other prompts of the same form as those to be ablated, with roles.
        seed: of the draws.
        mlps: also record what MLPs put out, so that they can be ablated too.
        batch_size: prompts run together.

    Raises:
        InputError: if the prompts have no roles.
    """
    _roles(prompts)
    prompts = prompts.to(model.cfg.device or "cpu")
    share = share_of(len(prompts))
    kept: dict[str, list[Tensor]] = {}
    for chunk in prompts[share.rows].chunks(batch_size):
        for name, outputs in record(model, chunk, _points(model, mlps)).items():
            # The prompts come last, where processes' shares are put together.
            kept.setdefault(name, []).append(outputs.flatten(2).movedim(0, -1))
    mask = prompts.mask
    tables = {}
    for name, parts in kept.items():
        whole = gathered(torch.cat(parts, -1), share).movedim(-1, 0)
        tables[name] = whole[mask.to(whole.device)]
    heads, of_mlps = _tables(model, tables)
    row_prompts, _ = mask.nonzero(as_tuple=True)
    return Ablation(
        kind="resample",
        outputs=heads,
        mlp_outputs=of_mlps,
        role_names=prompts.role_names,
        row_roles=_roles(prompts)[mask],
        row_prompts=row_prompts,
        prompt_tokens=prompts.tokens.masked_fill(~mask, -1),
        seed=seed,
    )


@checked
def index_ablation(model: Model, prompts: PromptBatch, *, batch_size: int = BATCH_SIZE) -> Ablation:
    """Ablate to the mean over the tokens of the same index (Prakash et al. 2024, §3.3).

    In prompts of one length it leaves which token it is: the mean of a head at the label of the
    third segment says that it is the third. `mean_head_outputs` gives the same values as a tensor.

    Args:
        model: the model.
        prompts: other prompts of the same form as those to be ablated.
        batch_size: prompts run together.

    Raises:
        InputError: as `mean_head_outputs`.
    """
    return Ablation.by_index(mean_head_outputs(model, prompts, batch_size=batch_size))


@checked
def zero_ablation() -> Ablation:
    """Ablate to zero: neither information nor the mean of a head is left.

    What follows was never trained for such inputs, so heads that only put out a constant count as
    needed.
    """
    return Ablation("zero", None)


@checked
@torch.no_grad()
def mean_head_outputs(
    model: Model,
    tokens: PromptBatch | Int[Tensor, "batch pos"],
    *,
    batch_size: int = BATCH_SIZE,
) -> Float[Tensor, "layer pos head d_head"]:
    """Mean `hook_z` of every head at every token position, over prompts of one form.

    These are the values that ablated heads get in the paper (§3.3); `index_ablation` says what they
    leave. A padded position counts only the prompts that have a token there.

    Args:
        model: the model.
        tokens: prompts, or unpadded tokens.
        batch_size: prompts run together.

    Raises:
        InputError: if a batch is padded on the left, where positions do not line up.
    """
    if not isinstance(tokens, PromptBatch):
        n, length = tokens.shape
        last = torch.full((n,), length - 1, device=tokens.device)
        tokens = PromptBatch(tokens, torch.zeros_like(last), {"last": last})
    if not bool(tokens.mask[:, 0].all()):
        raise InputError("Mean head outputs need prompts padded on the right, not the left.")
    tokens = tokens.to(model.cfg.device or "cpu")
    points = _points(model, mlps=False)
    sums: dict[str, Tensor] = {}
    share = share_of(len(tokens))
    for chunk in tokens[share.rows].chunks(batch_size):
        there = chunk.mask[:, :, None, None] & (share.n > 0)
        for name, z in record(model, chunk, points).items():
            total = (z.to(torch.float64) * there.to(z.device)).sum(0)
            sums[name] = sums[name] + total if name in sums else total
    sums = {name: summed(total) for name, total in sums.items()}
    counts = tokens.mask.sum(0).clamp(min=1)[:, None, None]
    means = [sums[name].to(counts.device) / counts for name in points]
    return torch.stack(means).to(model.cfg.dtype)


def _points(model: Model, mlps: bool) -> dict[str, str | slice | None]:
    points = ("z", "mlp_out") if mlps else ("z",)
    return {hook_point(p, layer): None for p in points for layer in range(model.cfg.n_layers)}


def _tables(model: Model, by_point: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Head and MLP outputs of all layers from [row, ...] of each hook point."""
    cfg = model.cfg

    def stacked(point: str) -> Tensor:
        layers = [by_point[hook_point(point, layer)] for layer in range(cfg.n_layers)]
        return torch.stack([rows.to(layers[0].device) for rows in layers]).to(cfg.dtype)

    heads = stacked("z").unflatten(-1, (cfg.n_heads, cfg.d_head))
    return heads, stacked("mlp_out") if hook_point("mlp_out", 0) in by_point else None


def _roles(prompts: PromptBatch) -> Int[Tensor, "batch pos"]:
    if prompts.roles is None:
        raise InputError(
            "Outputs can't be taken by role, as the prompts have none; give PromptBatch its roles, "
            "or take index_ablation."
        )
    return prompts.roles.cpu()
