"""Hooks that give one model's heads what another model computes on the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.edits import Cache, Hook, patch_heads
from tl_entity.hooks.points import check_heads, hook_point, kv_head, point_and_layer
from tl_entity.hooks.run import HookFunction, record
from tl_entity.hooks.same_architecture import ROTARY_TOKENS as ROTARY_TOKENS
from tl_entity.hooks.same_architecture import SHARED_SETTINGS as SHARED_SETTINGS
from tl_entity.hooks.same_architecture import check_same_architecture as check_same_architecture
from tl_entity.models.architecture import refuse
from tl_entity.tasks.batches import PromptBatch

INPUT_POINTS = {"q": "q", "k": "rot_k", "v": "v"}
"""Where each input of a head is read in the source model's run.

Where queries and keys are normalised (Qwen3), q is read at `rot_q`: it is the normalised one that
is compared with keys."""


@checked
@torch.no_grad()
def patch_from_model(
    source: Model,
    into: Model,
    prompts: PromptBatch,
    heads: Circuit | HeadsAt,
    *,
    point: str = "z",
) -> list[Hook]:
    """Hooks for `into` that give its heads, at named positions, what `source` computes on the same
    prompts (cross-model activation patching, CMAP; Prakash et al. 2024, §5).

    Vectors are replaced at the named position itself. To let a head attend with another model's
    keys or values, which stand at all the tokens it reads, see `patch_inputs_from_model`.

    Args:
        source: the model read, such as the fine-tuned one.
        into: the model to be run with the hooks, such as the base.
        prompts: the prompts of both runs.
        heads: a circuit, or heads by named position.
        point: z for the heads' outputs; q, k or v for what they read.

    Raises:
        InputError: if the models differ in architecture or tokenizer, or a head or position does
            not exist.
    """
    check_same_architecture(source, into)
    by_position = heads_by_position(heads)
    chosen = [head for at in by_position.values() for head in at]
    check_heads(source, chosen)
    points: dict[str, str | None] = {hook_point(point, head.layer): None for head in chosen}
    return patch_heads(record(source, prompts, points), by_position, into=prompts, point=point)


@checked
@dataclass(frozen=True)
class ReplaceKeys:
    """Let some heads, at one token of each prompt, compare their query with other keys.

    One edit for two hook points of a layer: at `rot_q` it takes note of the queries, at
    `attn_scores` it writes their scores with the other keys. The query stays the run's own; so do
    the scores of every other token, and of heads that share a key vector. What a token can't see
    stays hidden.

    Attributes:
        positions: the token edited in each prompt.
        heads: indices of the query heads.
        keys: the other key of every token, after the rotary embedding (`rot_k`).
        scale: what scores are divided by.
        noted: the queries, on their way from the one hook point to the other.
    """

    positions: Int[Tensor, " batch"]
    heads: Int[Tensor, " heads"]
    keys: Float[Tensor, "batch pos heads d_head"]
    scale: float
    noted: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        point, _ = point_and_layer(hook.name)
        batch, length, _, d_head = self.keys.shape
        if point == "rot_q":
            _check_axes(activation, hook, (batch, None, None, d_head))
            self.noted[:] = [activation[_entries(self, activation, hook, token_axis=1)]]
            return activation
        _check_point(self, point, "attn_scores", hook)
        _check_axes(activation, hook, (batch, None, None, length))
        at = _entries(self, activation, hook, token_axis=2)
        queries = _take(self.noted, hook)
        scores = torch.einsum("bhd,bkhd->bhk", queries, self.keys.to(queries)) / self.scale
        edited = activation.clone()
        hidden = activation[at].isneginf()
        edited[at] = scores.to(activation).masked_fill(hidden, float("-inf"))
        return edited


@checked
@dataclass(frozen=True)
class ReplaceValues:
    """Let some heads, at one token of each prompt, put out other values, weighed as they attend.

    One edit for two hook points of a layer: at `attn_scores` it takes note of how the heads attend,
    at `z` it writes the mean of the other values with these weights. The weights stay the run's
    own; so does what every other token puts out, and heads that share a value vector.

    Attributes:
        positions: the token edited in each prompt.
        heads: indices of the query heads.
        values: the other value of every token.
        noted: the attention weights, on their way from the one hook point to the other.
    """

    positions: Int[Tensor, " batch"]
    heads: Int[Tensor, " heads"]
    values: Float[Tensor, "batch pos heads d_head"]
    noted: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        point, _ = point_and_layer(hook.name)
        batch, length, _, d_head = self.values.shape
        if point == "attn_scores":
            _check_axes(activation, hook, (batch, None, None, length))
            scores = activation[_entries(self, activation, hook, token_axis=2)]
            self.noted[:] = [scores.softmax(-1)]
            return activation
        _check_point(self, point, "z", hook)
        _check_axes(activation, hook, (batch, None, None, d_head))
        weights = _take(self.noted, hook)
        values = self.values.to(weights)
        edited = activation.clone()
        at = _entries(self, activation, hook, token_axis=1)
        edited[at] = torch.einsum("bhk,bkhd->bhd", weights, values).to(activation)
        return edited


@checked
def patch_inputs_from_model(
    source: Model,
    into: Model,
    prompts: PromptBatch,
    heads: Circuit | HeadsAt,
    *,
    inputs: str,
) -> list[tuple[str, HookFunction]]:
    """Hooks for `into` by which its heads, each at its named position, attend with the queries,
    keys or values that `source` computes on the same prompts (CMAP of q, k and v; Prakash et al.
    2024, §5).

    What a head puts out at its position p is sum_j softmax_j(q[p] · k[j] / scale) v[j], over the
    tokens j up to p. Of q[p], all k[j] and all v[j], those named in `inputs` are the source's, for
    this head alone; the others are what the patched run itself computes. The head's output at other
    tokens, and heads that share its keys and values, change only through what comes before them.
    With all three, the output at p is the source's own.

    Args:
        source: the model read.
        into: the model to be run with the hooks.
        prompts: the prompts of both runs.
        heads: a circuit, or heads by named position.
        inputs: some of the letters q, k, v, such as "qk".

    Raises:
        InputError: as `patch_from_model`; if `inputs` is none of these; or for k or v if the models
            do more with queries, keys or scores than a Llama.
    """
    check_same_architecture(source, into)
    by_position = heads_by_position(heads)
    chosen = [head for at in by_position.values() for head in at]
    check_heads(source, chosen)
    with torch.no_grad():
        cache = record(source, prompts, input_points(chosen, inputs, into))
    return input_hooks(cache, into, prompts, by_position, inputs=inputs)


@checked
def input_points(heads: Sequence[Head], inputs: str, model: Model) -> dict[str, str | None]:
    """The hook points that `input_hooks` reads, for `record` of a model like this one.

    Raises:
        InputError: if `inputs` is not made of different letters of q, k, v.
    """
    _check_inputs(inputs)
    layers = sorted({head.layer for head in heads})
    return {
        hook_point(_input_point(which, model), layer): None for which in inputs for layer in layers
    }


@checked
def input_hooks(
    cache: Cache,
    into: Model,
    prompts: PromptBatch,
    heads: Circuit | HeadsAt,
    *,
    inputs: str,
) -> list[tuple[str, HookFunction]]:
    """`patch_inputs_from_model` from a recorded run of the source on the same prompts.

    Args:
        cache: the source's activations at `input_points`.
        into: the model to be run with the hooks.
        prompts: the prompts of both runs.
        heads: a circuit, or heads by named position.
        inputs: some of the letters q, k, v.

    Raises:
        InputError: as `patch_inputs_from_model`; or if the cache lacks a hook point.
    """
    _check_inputs(inputs)
    if set(inputs) & {"k", "v"}:
        _check_plain_attention(into)
    hooks: list[tuple[str, HookFunction]] = []
    if "q" in inputs:
        hooks += patch_heads(cache, heads, into=prompts, point=_input_point("q", into))
    for position, at in heads_by_position(heads).items():
        where = prompts.position(position)
        for layer in sorted({head.layer for head in at}):
            indices = [head.head for head in at if head.layer == layer]
            # Keys ahead of values: the weights that values get are those of the other keys.
            if "k" in inputs:
                keys = _of_heads(cache, "rot_k", layer, indices, into)
                edit = ReplaceKeys(where, torch.tensor(indices), keys, into.cfg.d_head**0.5)
                hooks += [(hook_point(name, layer), edit) for name in ("rot_q", "attn_scores")]
            if "v" in inputs:
                values = _of_heads(cache, "v", layer, indices, into)
                edit = ReplaceValues(where, torch.tensor(indices), values)
                hooks += [(hook_point(name, layer), edit) for name in ("attn_scores", "z")]
    return hooks


def _check_inputs(inputs: str) -> None:
    if not inputs or len(set(inputs)) != len(inputs) or not set(inputs) <= set(INPUT_POINTS):
        raise InputError(f"{inputs!r} is not made of different letters of q, k and v.")


def _input_point(which: str, model: Model) -> str:
    return "rot_q" if which == "q" and _normalizes_queries(model) else INPUT_POINTS[which]


def _normalizes_queries(model: Model) -> bool:
    """Whether each head's queries and keys are normalised before the rotary embedding."""
    if isinstance(model, HookedTransformer):
        return bool(model.cfg.use_qk_norm)
    attn: Any = model.blocks[0].attn
    return "q_norm" in attn.submodules


def _check_plain_attention(model: Model) -> None:
    obstacles = ("positions", "norm of all heads", "scaled queries", "clipped", "capped scores")
    refuse(
        model.cfg,
        (*obstacles, "sinks"),
        "Keys and values can't be patched in this model: {reason}.",
    )


def _of_heads(
    cache: Cache, name: str, layer: int, heads: Sequence[int], model: Model
) -> Float[Tensor, "batch pos heads d_head"]:
    full_name = hook_point(name, layer)
    if full_name not in cache:
        raise InputError(f"The cache lacks {full_name}; record it in the run to be read.")
    activation = cache[full_name]
    # Shared key-value heads, or, within `separate_kv_heads`, one for each query head.
    apart = activation.shape[2] == model.cfg.n_heads
    return activation[:, :, [head if apart else kv_head(model.cfg, head) for head in heads]]


def _entries(
    edit: ReplaceKeys | ReplaceValues, activation: Tensor, hook: Any, *, token_axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the edited (prompt, token, head) entries, axes in the activation's order."""
    for indices, axis in ((edit.positions, token_axis), (edit.heads, 3 - token_axis)):
        if len(indices) and int(indices.max()) >= activation.shape[axis]:
            raise InputError(
                f"{hook.name} has shape {tuple(activation.shape)}; the edit is made for token "
                f"{int(edit.positions.max())} and head {int(edit.heads.max())}."
            )
    device = activation.device
    rows = torch.arange(len(edit.positions), device=device)[:, None]
    tokens, heads = edit.positions.to(device)[:, None], edit.heads.to(device)[None]
    return (rows, tokens, heads) if token_axis == 1 else (rows, heads, tokens)


def _take(noted: list[Tensor], hook: Any) -> Tensor:
    if not noted:
        raise InputError(
            f"The edit at {hook.name} needs what it notes at an earlier hook point; "
            "run both of its hooks."
        )
    return noted.pop()


def _check_point(edit: object, point: str, wanted: str, hook: Any) -> None:
    if point != wanted:
        raise InputError(f"{type(edit).__name__} makes no edit at {hook.name}.")


def _check_axes(activation: Tensor, hook: Any, sizes: tuple[int | None, ...]) -> None:
    if activation.ndim != 4 or any(
        size not in (None, got) for size, got in zip(sizes, activation.shape, strict=True)
    ):
        shown = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(
            f"{hook.name} has shape {tuple(activation.shape)}; the edit is made for ({shown})."
        )
