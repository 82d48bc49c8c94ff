"""Making ablations: what heads and MLPs put out on other prompts, by role or by token index."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.hooks.vocabulary import check_prompts
from tl_entity.ranks import gathered, share_of, summed
from tl_entity.runs.runner import BATCH_SIZE
from tl_entity.tasks.batches import NO_ROLE, PromptBatch


@checked
@torch.no_grad()
def pooled_ablation(
    model: Model,
    prompts: PromptBatch,
    *,
    roles: Sequence[str] | None = None,
    mlps: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Ablation:
    """Ablate to the mean over all tokens of the same role, in all prompts.

    It leaves of a head's output what all tokens of the role have in common: not which segment a
    label stands in, nor which label it is. With prompts of one form, the mean over the paper's
    token indices leaves the former.

    Args:
        model: the model.
        prompts: other prompts of the same form as those to be ablated, with roles.
        roles: pool only tokens of these roles and take the mean by token index elsewhere, to see
            what the paper's ablation leaves at them; all if left out.
        mlps: also record what MLPs put out, so that they can be ablated too.
        batch_size: prompts run together.

    Raises:
        InputError: if the prompts have no roles, not those named, or some that tell what is asked.
    """
    check_prompts(model, prompts)
    of_tokens = _roles(prompts)
    names = tuple(name for name in prompts.role_names if bool(prompts.where(name).any()))
    unknown = set(roles or ()) - set(names)
    if unknown:
        raise InputError(
            f"The prompts have no token of role {', '.join(sorted(unknown))}; they have those of "
            f"{', '.join(names)}."
        )
    names = names if roles is None else tuple(name for name in names if name in roles)
    row_of_role = torch.full((len(prompts.role_names) + 1,), NO_ROLE)
    row_of_role[[prompts.role_names.index(name) for name in names]] = torch.arange(len(names))
    rows = row_of_role[of_tokens]
    if roles is None:
        n_rows = len(names)
    else:
        _check_right(prompts)
        index = torch.arange(len(names), len(names) + rows.shape[1])
        rows = torch.where((rows < 0) & prompts.mask.cpu(), index, rows)
        n_rows = len(names) + rows.shape[1]
    heads, of_mlps = _mean_by_row(model, prompts, rows, n_rows, mlps=mlps, batch_size=batch_size)
    return Ablation(
        kind="pooled",
        outputs=heads,
        mlp_outputs=of_mlps,
        role_names=names,
        row_roles=torch.tensor([*range(len(names)), *[NO_ROLE] * (n_rows - len(names))]),
        index_from=None if roles is None else len(names),
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
        InputError: if the prompts have no roles, or some that tell what is asked.
    """
    check_prompts(model, prompts)
    of_tokens = _roles(prompts)
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
        row_roles=of_tokens[mask.cpu()],
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
def make_ablation(
    model: Model,
    prompts: PromptBatch,
    kind: AblationKind,
    *,
    seed: int = 0,
    mlps: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Ablation:
    """The ablation of a kind that is known by name; arguments and errors are those of its function.
    Means by token index are of heads alone, whatever `mlps` says."""
    if kind == "pooled":
        return pooled_ablation(model, prompts, mlps=mlps, batch_size=batch_size)
    if kind == "resample":
        return resample_ablation(model, prompts, seed=seed, mlps=mlps, batch_size=batch_size)
    if kind == "index":
        return index_ablation(model, prompts, batch_size=batch_size)
    return zero_ablation()


@checked
@torch.no_grad()
def mean_head_outputs(
    model: Model,
    tokens: PromptBatch | Shaped[Tensor, "batch pos"],
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
        InputError: if a batch is padded on the left, where positions do not line up, or empty, or
            the model does not know a token or has hooks attached to it.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    if not isinstance(tokens, PromptBatch):
        n, length = tokens.shape
        last = torch.full((n,), length - 1, device=tokens.device)
        tokens = PromptBatch(tokens, torch.zeros_like(last), {"last": last})
    check_prompts(model, tokens)
    _check_right(tokens)
    n_pos = tokens.tokens.shape[1]
    rows = torch.where(tokens.mask.cpu(), torch.arange(n_pos), -1)
    return _mean_by_row(model, tokens, rows, n_pos, mlps=False, batch_size=batch_size)[0]


def _mean_by_row(
    model: Model,
    prompts: PromptBatch,
    rows: Int[Tensor, "batch pos"],
    n_rows: int,
    *,
    mlps: bool,
    batch_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Mean head and MLP outputs over the tokens of each row; those of row -1 are left out.
    Processes share the prompts."""
    prompts = prompts.to(model.cfg.device or "cpu")
    share = share_of(len(prompts))
    sums: dict[str, Tensor] = {}
    parts = zip(
        prompts[share.rows].chunks(batch_size), rows[share.rows].split(batch_size), strict=True
    )
    for chunk, row in parts:
        # A process without a share of its own runs a prompt that does not count.
        there = ((row >= 0) & (share.n > 0)).flatten().nonzero()[:, 0]
        for name, outputs in record(model, chunk, _points(model, mlps)).items():
            flat = outputs.flatten(0, 1).flatten(1).to(torch.float64)
            if name not in sums:
                sums[name] = flat.new_zeros(n_rows, flat.shape[1])
            counted = flat[there.to(flat.device)]
            sums[name].index_add_(0, row.flatten()[there].to(flat.device), counted)
    counts = rows[rows >= 0].bincount(minlength=n_rows).clamp(min=1)[:, None]
    means = {name: summed(total) / counts.to(total.device) for name, total in sums.items()}
    return _tables(model, means)


def _check_right(prompts: PromptBatch) -> None:
    if not bool(prompts.mask[:, 0].all()):
        raise InputError("Mean head outputs need prompts padded on the right, not the left.")


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
    telling = [
        name
        for name in prompts.role_names
        if name in prompts.knowing and bool(prompts.where(name).any())
    ]
    if telling:
        raise InputError(
            f"Outputs can't be taken by the role {telling[0]}, which tells what is asked: its mean "
            "would leave just that. Give the prompts blind roles."
        )
    return prompts.roles.cpu()
