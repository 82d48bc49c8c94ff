"""Checkpoint tensors as TransformerLens parameters: views of the file, never copies."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.utilities.multi_gpu import get_device_for_block_index

from tl_entity.errors import InputError
from tl_entity.finite import DAMAGED, NotFiniteError, are_finite, check_finite
from tl_entity.models.adapter import Adapter
from tl_entity.models.checkpoint import EMBEDDING, UNEMBEDDING, Checkpoint
from tl_entity.models.config import biased_projections


class Layout(NamedTuple):
    """How a tensor of the checkpoint is shown in TransformerLens's layout, and the way back.

    Neither moves a number: both give views.
    """

    to_hooked: Callable[[Tensor, HookedTransformerConfig], Tensor]
    to_checkpoint: Callable[[Tensor], Tensor]


AS_IS = Layout(lambda tensor, cfg: tensor, lambda parameter: parameter)
TRANSPOSED = Layout(lambda tensor, cfg: tensor.transpose(0, 1), lambda w: w.transpose(0, 1))
HEADS_FROM_ROWS = Layout(  # [head * d_head, d_model] as [head, d_model, d_head]
    lambda tensor, cfg: tensor.unflatten(0, (-1, cfg.d_head)).transpose(1, 2),
    lambda w: w.transpose(1, 2).flatten(0, 1),
)
HEADS_FROM_COLUMNS = Layout(  # [d_model, head * d_head] as [head, d_head, d_model]
    lambda tensor, cfg: tensor.unflatten(1, (-1, cfg.d_head)).permute(1, 2, 0),
    lambda w: w.permute(2, 0, 1).flatten(1, 2),
)
HEADS_OF_BIAS = Layout(  # [head * d_head] as [head, d_head]
    lambda tensor, cfg: tensor.unflatten(0, (-1, cfg.d_head)),
    lambda b: b.flatten(),
)

_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
TABLE: dict[str, tuple[str, Layout]] = {
    EMBEDDING: ("embed.W_E", AS_IS),
    "model.layers.{layer}.input_layernorm.weight": ("blocks.{layer}.ln1.w", AS_IS),
    f"{_ATTENTION}q_proj.weight": ("blocks.{layer}.attn.W_Q", HEADS_FROM_ROWS),
    f"{_ATTENTION}q_proj.bias": ("blocks.{layer}.attn.b_Q", HEADS_OF_BIAS),
    f"{_ATTENTION}k_proj.weight": ("blocks.{layer}.attn.{kv}W_K", HEADS_FROM_ROWS),
    f"{_ATTENTION}k_proj.bias": ("blocks.{layer}.attn.{kv}b_K", HEADS_OF_BIAS),
    f"{_ATTENTION}v_proj.weight": ("blocks.{layer}.attn.{kv}W_V", HEADS_FROM_ROWS),
    f"{_ATTENTION}v_proj.bias": ("blocks.{layer}.attn.{kv}b_V", HEADS_OF_BIAS),
    f"{_ATTENTION}o_proj.weight": ("blocks.{layer}.attn.W_O", HEADS_FROM_COLUMNS),
    f"{_ATTENTION}o_proj.bias": ("blocks.{layer}.attn.b_O", AS_IS),
    f"{_ATTENTION}q_norm.weight": ("blocks.{layer}.attn.q_norm.w", AS_IS),
    f"{_ATTENTION}k_norm.weight": ("blocks.{layer}.attn.k_norm.w", AS_IS),
    "model.layers.{layer}.post_attention_layernorm.weight": ("blocks.{layer}.ln2.w", AS_IS),
    f"{_MLP}gate_proj.weight": ("blocks.{layer}.mlp.W_gate", TRANSPOSED),
    f"{_MLP}up_proj.weight": ("blocks.{layer}.mlp.W_in", TRANSPOSED),
    f"{_MLP}down_proj.weight": ("blocks.{layer}.mlp.W_out", TRANSPOSED),
    "model.norm.weight": ("ln_final.w", AS_IS),
    UNEMBEDDING: ("unembed.W_U", TRANSPOSED),
}
"""Hugging Face's name, TransformerLens's, and the layout that makes one the other.

`{kv}` is `_` under grouped-query attention, where TransformerLens keeps one key and one value
matrix a key-value head under that name.
"""

COMPUTED = "rotary_emb.inv_freq"
"""Ending of tensors in old checkpoints that follow from the configuration."""


building = threading.RLock()
"""Held while a model is built: meanwhile settings that are torch's own, for all threads, differ."""


@contextmanager
def empty_weights() -> Generator[None, None, None]:
    """Within this context modules are built with their parameters on the meta device; buffers are
    small and made for real. Modules that other threads build are left alone."""
    thread = threading.get_ident()

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == thread:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with building:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_empty  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            nn.Module.register_parameter = register


def checked_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], adapter: Adapter | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint, one by one, the adapter's changes merged.

    Of a model with tied embeddings that has no tensor for the unembedding, none is given, unless
    the adapter makes the two differ.

    Args:
        checkpoint: where they come from.
        shapes: of every tensor that there must be in the end, by Hugging Face's name.
        adapter: merged where it has something for a tensor; it may bring another number of tokens.

    Raises:
        InputError: naming the file and the tensor, if a file is damaged or a tensor is unknown, of
            another shape than the configuration says, no floating-point numbers, there twice, or
            missing, or if the adapter belongs to another base.
        NotFiniteError: naming the file and the tensor, if a number is NaN or infinite.
    """
    seen: dict[str, str] = {}
    tied = checkpoint.config.tie_word_embeddings
    parted = adapter is not None and adapter.parts()
    embedding: Tensor | None = None
    for file, key, tensor in checkpoint.tensors():
        if key.endswith(COMPUTED):
            continue
        if key not in shapes:
            raise InputError(f"{file}: the tensor {key} {_why_unknown(key)}.")
        if key in seen:
            raise InputError(f"The tensor {key} is both in {seen[key]} and in {file}.")
        seen[key] = file
        own = (
            (checkpoint.config.vocab_size,) if key in (EMBEDDING, UNEMBEDDING) else shapes[key][:1]
        )
        _check(file, key, tensor, torch.Size((*own, *shapes[key][1:])))
        check_finite(f"{file}: {key}", tensor, DAMAGED)
        if key == EMBEDDING and tied and parted:
            embedding = tensor
        yield key, tensor if adapter is None else adapter.applied(key, tensor, tied=tied)
        del tensor  # what is decoded or merged is let go before the next is read
    if tied and UNEMBEDDING not in seen and EMBEDDING in seen:
        seen[UNEMBEDDING] = seen[EMBEDDING]
        if adapter is not None and embedding is not None:
            # What an adapter does to one of the two it does not do to the other.
            yield UNEMBEDDING, adapter.applied(UNEMBEDDING, embedding, tied=True)
    # Of two tied ones it is the embedding that would be missed.
    missing = [key for key in shapes if key not in seen and not (tied and key == UNEMBEDDING)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{checkpoint.place} lacks the weights {', '.join(missing[:3])}{more}.")
    if adapter is not None:
        adapter.check_used(set(seen), checkpoint.place)


def install_weights(
    model: HookedTransformer, checkpoint: Checkpoint, adapter: Adapter | None = None
) -> None:
    """Give a model whose parameters are on the meta device those of a checkpoint.

    Each parameter becomes a view of the checkpoint's tensor, in its own layout and without
    gradient; only another dtype or device, or an adapter that changes it, makes a copy. The
    checkpoint must hold exactly the tensors that its configuration calls for.

    Raises:
        InputError: as `checked_tensors`.
    """
    cfg = model.cfg
    places = _places(cfg, biased_projections(checkpoint.config))
    shapes = {
        key: layout.to_checkpoint(model.get_parameter(name)).shape
        for key, (name, layout) in places.items()
    }
    for key, tensor in checked_tensors(checkpoint, shapes, adapter):
        name, layout = places[key]
        _install(model, name, layout.to_hooked(tensor, cfg), f"{checkpoint.place}: {key}")
    _finish_unembedding(model)
    _install_zero_biases(model)


def share_weights(model: HookedTransformer, source: HookedTransformer, adapter: Adapter) -> None:
    """Give a model on the meta device the parameters of another, those that an adapter changes
    merged with it and all others shared.

    Raises:
        InputError: if the adapter belongs to another base.
    """
    cfg = source.cfg
    tied = cfg.tie_word_embeddings
    places = {name: (key, layout) for key, (name, layout) in _places(cfg, None).items()}
    for name, parameter in source.named_parameters():
        key, layout = places.get(name, ("", AS_IS))
        if key == UNEMBEDDING and tied and not adapter.parts():
            continue
        resized = model.cfg.d_vocab != cfg.d_vocab and key in (EMBEDDING, UNEMBEDDING)
        if not resized and not adapter.changed(key, tied=tied):
            if parameter.shape == model.get_parameter(name).shape:
                _install(model, name, parameter.detach())
            continue
        tensor = layout.to_checkpoint(parameter.detach())
        value = layout.to_hooked(adapter.applied(key, tensor, tied=tied), cfg)
        _install(model, name, value, f"{adapter.place}: {key}")
    _finish_unembedding(model)
    _install_zero_biases(model)  # of an unembedding of another size
    # Where the checkpoint has no bias, TransformerLens has zeros.
    there = {
        key
        for name, (key, _) in places.items()
        if not key.endswith(".bias") or bool(source.get_parameter(name).any())
    }
    adapter.check_used(there, "the model")


def install_folded(model: HookedTransformer, source: HookedTransformer) -> None:
    """Give a model on the meta device, whose norms have no weights, the parameters of another, the
    weights of its norms multiplied into the matrices that read them: attention's queries, keys and
    values, the MLP's two inputs, and the unembedding.

    What is read is made anew and all else shared. The other model is used up: its parameters are
    let go one by one, so that never more than one matrix is there twice.
    """
    for name, _ in list(model.named_parameters()):
        norm = _norm_before(name)
        value = source.get_parameter(name).detach()
        if norm is not None:
            # A matrix may have an axis of heads ahead of that of the residual stream.
            value = value * source.get_parameter(norm).detach().to(value.device)[:, None]
        _install(model, name, value)
        if name != "embed.W_E":  # which may be the unembedding too
            module, _, parameter = name.rpartition(".")
            setattr(source.get_submodule(module), parameter, None)
    model.cfg.tie_word_embeddings = False


def _norm_before(name: str) -> str | None:
    """The weights of the norm whose output this matrix reads, if it reads one."""
    module, _, parameter = name.rpartition(".")
    match module.rpartition(".")[2], parameter.lstrip("_"):
        case "attn", "W_Q" | "W_K" | "W_V":
            return f"{module.removesuffix('attn')}ln1.w"
        case "mlp", "W_gate" | "W_in":
            return f"{module.removesuffix('mlp')}ln2.w"
        case "unembed", "W_U":
            return "ln_final.w"
        case _:
            return None


def _places(
    cfg: HookedTransformerConfig, biased: frozenset[str] | None
) -> dict[str, tuple[str, Layout]]:
    """The table for this model: every tensor that its checkpoint must hold, layer by layer."""
    kv = "" if cfg.n_key_value_heads is None else "_"
    places = {}
    for key, (name, layout) in TABLE.items():
        if biased is not None and key.endswith(".bias") and key.split(".")[-2] not in biased:
            continue
        if key.endswith("_norm.weight") and "self_attn" in key and not cfg.use_qk_norm:
            continue
        for layer in range(cfg.n_layers) if "{layer}" in key else (0,):
            places[key.format(layer=layer)] = name.format(layer=layer, kv=kv), layout
    return places


def _why_unknown(key: str) -> str:
    if key.endswith(("gate_proj.bias", "up_proj.bias")):
        return "is a bias inside a gated MLP, which config.json does not announce (mlp_bias)"
    if ".lora_" in key or ".base_layer." in key:
        return "belongs to an adapter that was not merged"
    return "has no place in the model that config.json describes"


def _check(file: str, key: str, tensor: Tensor, shape: torch.Size) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{file}: {key} holds {kind}; quantised weights are not supported.")
    if tensor.shape != shape:
        raise InputError(
            f"{file}: {key} has shape {tuple(tensor.shape)}, which does not fit config.json: "
            f"it calls for {tuple(shape)}."
        )


def converted(
    where: str, tensor: Tensor, *, dtype: torch.dtype, device: str | torch.device
) -> Tensor:
    """A finite tensor on another device and in another dtype; the same one if it is so already.

    Raises:
        NotFiniteError: if it has numbers that the dtype cannot hold.
    """
    # To the device first: the narrower of two dtypes is what travels, and the wider is made there.
    value = tensor.to(device).to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not are_finite([value]):
        largest, name = float(tensor.abs().max()), str(dtype).removeprefix("torch.")
        raise NotFiniteError(
            f"{where} has numbers up to {largest:.3g}, and {name} holds at most "
            f"{torch.finfo(dtype).max:.3g}; load it in a wider dtype."
        )
    return value


def _finish_unembedding(model: HookedTransformer) -> None:
    """Where there is none of its own, it is the embedding."""
    tied = model.get_parameter("unembed.W_U").is_meta
    if tied:
        _install(model, "unembed.W_U", model.embed.W_E.transpose(0, 1))
    model.cfg.tie_word_embeddings = tied


def _install_zero_biases(model: HookedTransformer) -> None:
    # TransformerLens always has all biases; here the checkpoint's own are in place already.
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if not name.rpartition(".")[2].lstrip("_").startswith("b_"):
            raise AssertionError(f"The table of weights has no entry for {name}.")
        _install(model, name, torch.zeros(parameter.shape, dtype=model.cfg.dtype))


def _install(model: HookedTransformer, name: str, value: Tensor, where: str = "the model") -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    value = converted(where, value, dtype=model.cfg.dtype, device=_device_of(model, name))
    module._parameters[parameter_name] = nn.Parameter(value, requires_grad=False)


def _device_of(model: HookedTransformer, name: str) -> torch.device:
    """Where TransformerLens expects a parameter when blocks are spread over devices."""
    if name.startswith("blocks."):
        layer = int(name.split(".")[1])
    else:
        layer = 0 if name.startswith("embed.") else model.cfg.n_layers - 1
    return torch.device(get_device_for_block_index(layer, model.cfg))
