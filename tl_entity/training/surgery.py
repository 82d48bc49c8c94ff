"""Exact changes of a model's weights, of which it is known what they change.

The changed model is always another one; the one given stays as it is.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head


@checked
def rotate_heads(model: HookedTransformer, generator: torch.Generator) -> HookedTransformer:
    """The same function in other weights: another basis inside every head.

    Values, and what reads them, turn by any rotation; queries and keys turn within the planes of
    the rotary embedding, which leaves every attention score as it is. Both stay exact but for
    rounding.

    Args:
        model: with rotary embeddings over the whole head, halves of a head paired.
        generator: draws the rotations.
    """
    turned = copy.deepcopy(model)
    each, dtype = queries_of_a_key(model), model.cfg.dtype
    for block in turned.blocks:
        attn = block.attn
        for kv in range(model.cfg.n_heads // each):
            value = _rotation(model.cfg.d_head, generator).to(dtype)
            key = _rotary_rotation(model.cfg.d_head, generator).to(dtype)
            keys, values = _keys_and_values(attn, model)
            for parameter, turn in ((keys[0], key), (keys[1], key), (values[0], value)):
                parameter[kv] = parameter[kv] @ turn
            values[1][kv] = values[1][kv] @ value
            for head in range(kv * each, (kv + 1) * each):
                attn.W_Q.data[head] = attn.W_Q.data[head] @ key
                attn.b_Q.data[head] = attn.b_Q.data[head] @ key
                attn.W_O.data[head] = value.T @ attn.W_O.data[head]
    return turned


@checked
def reorder_heads(model: HookedTransformer, orders: Sequence[Sequence[int]]) -> HookedTransformer:
    """The same function by other heads: the heads of each layer in another order.

    Args:
        model: any.
        orders: for each layer, which head comes to stand at each place. Heads that share a key
            and value must go on sharing one.

    Raises:
        InputError: if an order isn't one of all heads, or parts heads that share a key.
    """
    each, n_heads = queries_of_a_key(model), model.cfg.n_heads
    if len(orders) != model.cfg.n_layers:
        raise InputError(f"There are {len(orders)} orders for {model.cfg.n_layers} layers.")
    reordered = copy.deepcopy(model)
    for layer, (block, order) in enumerate(zip(reordered.blocks, orders, strict=True)):
        if sorted(order) != list(range(n_heads)):
            raise InputError(f"Layer {layer}: {list(order)} is no order of {n_heads} heads.")
        groups = [[head // each for head in order[i : i + each]] for i in range(0, n_heads, each)]
        if any(len(set(group)) > 1 for group in groups):
            raise InputError(
                f"Layer {layer}: heads that share a key and value are parted by {list(order)}."
            )
        keys, values = _keys_and_values(block.attn, model)
        for parameter in (block.attn.W_Q, block.attn.b_Q, block.attn.W_O):
            parameter.data[:] = parameter.data[list(order)]
        for parameter in (*keys, *values):
            parameter[:] = parameter[[group[0] for group in groups]]
    return reordered


@checked
def scale_queries(
    model: HookedTransformer, heads: Sequence[Head], factor: float
) -> HookedTransformer:
    """A model in which some heads look more, or less, sharply: their attention scores times a
    factor."""
    scaled = copy.deepcopy(model)
    for layer, head in heads:
        scaled.blocks[layer].attn.W_Q.data[head] *= factor
        scaled.blocks[layer].attn.b_Q.data[head] *= factor
    return scaled


@checked
def rewire_queries(
    model: HookedTransformer, reads: Mapping[Head, Mapping[Head, float]]
) -> HookedTransformer:
    """A model in which queries read more, or less, of what heads below write.

    All else reads what it read.

    The residual stream gets a few dimensions more. There each sender writes its output a second
    time, so faintly that the norms don't notice, and the receiver's query reads it from there as
    many times more or less as is wished.

    Args:
        model: with RMS norms.
        reads: for each receiver, and each sender below it, how many times the query is to read the
            sender's output; 1 is as before, 0 not at all.

    Returns:
        A model of more dimensions. With no reads but 1 its logits are the model's, to 1e-4.

    Raises:
        InputError: if a sender isn't below the receiver.
    """
    senders = sorted({sender for read in reads.values() for sender in read})
    for receiver, read in reads.items():
        for sender in read:
            if sender.layer >= receiver.layer:
                raise InputError(f"{receiver} can't read {sender}, which isn't below it.")
    old, d_head = model.cfg.d_model, model.cfg.d_head
    wide = _widened(model, old + d_head * len(senders))
    places = {
        sender: slice(old + i * d_head, old + (i + 1) * d_head) for i, sender in enumerate(senders)
    }
    for (layer, head), place in places.items():
        wide.blocks[layer].attn.W_O.data[head][:, place] = _FAINT * torch.eye(d_head)
    for receiver, read in reads.items():
        block, shrunk = wide.blocks[receiver.layer], math.sqrt(old / wide.cfg.d_model)
        for sender, times in read.items():
            written = model.blocks[sender.layer].attn.W_O.data[sender.head]
            seen = written * model.blocks[receiver.layer].get_parameter("ln1.w").data
            reading = seen @ model.blocks[receiver.layer].attn.W_Q.data[receiver.head]
            norm, queries = block.get_parameter("ln1.w"), block.get_parameter("attn.W_Q")
            norm.data[places[sender]] = shrunk
            queries.data[receiver.head][places[sender]] = (times - 1) / _FAINT * reading
    return wide


@checked
def double_heads(model: HookedTransformer, shares: Float[Tensor, " n_layers"]) -> HookedTransformer:
    """The same function by twice as many heads: behind all heads of a layer stand copies of them,
    which write a share of what the heads wrote, and these the rest.

    Args:
        model: any.
        shares: the copies' share in each layer; with 0 they are idle.
    """
    cfg = copy.deepcopy(model.cfg)
    cfg.n_heads *= 2
    if cfg.n_key_value_heads is not None:
        cfg.n_key_value_heads *= 2
    state = model.state_dict()
    for name, tensor in state.items():
        if ".attn." in name and name.rsplit(".", 1)[1].lstrip("_") in _BY_HEAD:
            again = torch.cat([tensor, tensor])
            if name.endswith("W_O"):
                share = float(shares[int(name.split(".")[1])])
                again = torch.cat([(1 - share) * tensor, share * tensor])
            state[name] = again
    return _made(cfg, state, model)


@checked
def insert_idle_layer(model: HookedTransformer, at: int, like: int = 0) -> HookedTransformer:
    """The same function with one layer more, which writes nothing.

    Args:
        model: any.
        at: the new layer's place; `n_layers` puts it above all others.
        like: the layer whose weights it has, but for those that write.

    Raises:
        InputError: if there are no such layers.
    """
    n_layers = model.cfg.n_layers
    if not 0 <= at <= n_layers or not 0 <= like < n_layers:
        raise InputError(f"A layer like {like} can't stand at {at} in {n_layers} layers.")
    cfg = copy.deepcopy(model.cfg)
    cfg.n_layers += 1
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("blocks."):
            state[name] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        state[f"blocks.{int(layer) + (int(layer) >= at)}.{rest}"] = tensor
        if int(layer) == like:
            writes = rest in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
            state[f"blocks.{at}.{rest}"] = torch.zeros_like(tensor) if writes else tensor
    return _made(cfg, state, model)


_BY_HEAD = {"W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"}

_OF_THE_STREAM = {
    "W_E": (1,),
    "w": (0,),
    "W_Q": (1,),
    "W_O": (2,),
    "_W_K": (1,),
    "_W_V": (1,),
    "W_K": (1,),
    "W_V": (1,),
    "b_O": (0,),
    "W_in": (0,),
    "W_gate": (0,),
    "W_out": (1,),
    "b_out": (0,),
    "W_U": (0,),
}
"""The dimension of each parameter that goes along the residual stream."""

_FAINT = 1e-3
"""How loud a head's second output is, beside its first."""


def queries_of_a_key(model: HookedTransformer) -> int:
    """How many heads read one key and value."""
    return model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)


def _keys_and_values(
    attn: torch.nn.Module, model: HookedTransformer
) -> tuple[list[Tensor], list[Tensor]]:
    """Weight and bias of the keys and of the values, one for each key-value head."""
    shared = "_" if model.cfg.n_key_value_heads is not None else ""
    found = [[attn.get_parameter(f"{shared}{part}_{name}").data for part in "Wb"] for name in "KV"]
    return found[0], found[1]


def _rotation(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def _rotary_rotation(d_head: int, generator: torch.Generator) -> Float[Tensor, "d_head d_head"]:
    """A turn within each plane of the rotary embedding, which pairs the halves of a head."""
    half = d_head // 2
    angle = 2 * math.pi * torch.rand(half, generator=generator, dtype=torch.float64)
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])


def _widened(model: HookedTransformer, d_model: int) -> HookedTransformer:
    """The same function with a wider residual stream, of which the added part holds nothing."""
    old = model.cfg.d_model
    share = old / d_model
    # The mean square is taken over more dimensions, and what a norm adds to it shrinks alike.
    cfg = copy.deepcopy(model.cfg)
    cfg.d_model, cfg.eps = d_model, model.cfg.eps * share
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("ln1.w", "ln2.w", "ln_final.w")):
            tensor = tensor * math.sqrt(share)
        for dim in _OF_THE_STREAM.get(name.rsplit(".", 1)[1], ()):
            more = list(tensor.shape)
            more[dim] = d_model - old
            tensor = torch.cat([tensor, tensor.new_zeros(more)], dim)
        state[name] = tensor
    return _made(cfg, state, model)


def _made(
    cfg: HookedTransformerConfig, state: Mapping[str, Tensor], model: HookedTransformer
) -> HookedTransformer:
    """A model of these weights, with the tokenizer of the one that it is made from."""
    made = HookedTransformer(cfg, move_to_device=False)
    made.load_state_dict(dict(state))
    made.tokenizer = model.tokenizer
    made.requires_grad_(False)
    return made.eval()
