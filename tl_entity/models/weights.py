"""Checkpoint tensors as TransformerLens parameters: views of the file, never copies."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PretrainedConfig

from tl_entity.errors import InputError
from tl_entity.models.config import biased_projections

View = Callable[[Tensor, HookedTransformerConfig], Tensor]
"""Shows a tensor of the checkpoint in TransformerLens's layout without moving a number."""


def _as_is(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor


def _transposed(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor.transpose(0, 1)


# The head axis is split with `unflatten`, not `view`: a tensor with its axes exchanged has the
# right number of elements and would be taken for another one.
def _heads_from_rows(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    # [head * d_head, d_model] as [head, d_model, d_head]
    return tensor.unflatten(0, (-1, cfg.d_head)).transpose(1, 2)


def _heads_from_columns(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    # [d_model, head * d_head] as [head, d_head, d_model]
    return tensor.unflatten(1, (-1, cfg.d_head)).permute(1, 2, 0)


def _heads_of_bias(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    # [head * d_head] as [head, d_head]
    return tensor.unflatten(0, (-1, cfg.d_head))


TABLE: dict[str, tuple[str, View]] = {
    "model.embed_tokens.weight": ("embed.W_E", _as_is),
    "model.layers.{layer}.input_layernorm.weight": ("blocks.{layer}.ln1.w", _as_is),
    "model.layers.{layer}.self_attn.q_proj.weight": ("blocks.{layer}.attn.W_Q", _heads_from_rows),
    "model.layers.{layer}.self_attn.q_proj.bias": ("blocks.{layer}.attn.b_Q", _heads_of_bias),
    "model.layers.{layer}.self_attn.k_proj.weight": (
        "blocks.{layer}.attn.{kv}W_K",
        _heads_from_rows,
    ),
    "model.layers.{layer}.self_attn.k_proj.bias": ("blocks.{layer}.attn.{kv}b_K", _heads_of_bias),
    "model.layers.{layer}.self_attn.v_proj.weight": (
        "blocks.{layer}.attn.{kv}W_V",
        _heads_from_rows,
    ),
    "model.layers.{layer}.self_attn.v_proj.bias": ("blocks.{layer}.attn.{kv}b_V", _heads_of_bias),
    "model.layers.{layer}.self_attn.o_proj.weight": (
        "blocks.{layer}.attn.W_O",
        _heads_from_columns,
    ),
    "model.layers.{layer}.self_attn.o_proj.bias": ("blocks.{layer}.attn.b_O", _as_is),
    "model.layers.{layer}.post_attention_layernorm.weight": ("blocks.{layer}.ln2.w", _as_is),
    "model.layers.{layer}.mlp.gate_proj.weight": ("blocks.{layer}.mlp.W_gate", _transposed),
    "model.layers.{layer}.mlp.up_proj.weight": ("blocks.{layer}.mlp.W_in", _transposed),
    "model.layers.{layer}.mlp.down_proj.weight": ("blocks.{layer}.mlp.W_out", _transposed),
    "model.norm.weight": ("ln_final.w", _as_is),
    "lm_head.weight": ("unembed.W_U", _transposed),
}
"""Hugging Face's name, TransformerLens's, and the view that makes one the other.

`{kv}` is `_` under grouped-query attention, where TransformerLens keeps one key and one value
matrix a key-value head under that name.
"""

COMPUTED = "rotary_emb.inv_freq"
"""Ending of tensors in old checkpoints that follow from the configuration."""


def install_weights(model: HookedTransformer, folder: Path, config: PretrainedConfig) -> None:
    """Give a model whose parameters are on the meta device those of a folder of safetensors.

    Each parameter becomes a view of the tensor in the memory-mapped file, in the checkpoint's own
    layout and without gradient; only another dtype or device makes a copy. The checkpoint must
    hold exactly the tensors that its configuration calls for.

    Raises:
        InputError: naming the file and the tensor, if a file is damaged or a tensor is unknown, of
            another shape than the configuration says, no floating-point numbers, there twice, or
            missing.
    """
    cfg = model.cfg
    places = _places(cfg, biased_projections(config))
    seen: dict[str, Path] = {}
    for file, key, tensor in _tensors(folder, str(cfg.device)):
        if key.endswith(COMPUTED):
            continue
        if key not in places:
            raise InputError(f"{file}: the tensor {key} {_why_unknown(key)}.")
        if key in seen:
            raise InputError(f"The tensor {key} is both in {seen[key]} and in {file}.")
        seen[key] = file
        name, view = places[key]
        _install(model, name, _viewed(file, key, tensor, view, cfg, model.get_parameter(name)))
    if config.tie_word_embeddings and "lm_head.weight" not in seen:
        places.pop("lm_head.weight")
        if "model.embed_tokens.weight" in seen:
            _install(model, "unembed.W_U", model.embed.W_E.transpose(0, 1))
    missing = [key for key in places if key not in seen]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{folder} lacks the weights {', '.join(missing[:3])}{more}.")
    _install_zero_biases(model)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or those that its index names.

    Raises:
        InputError: if there are none, or the index is damaged or names one that is missing.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_index(index).values()))]
        for file in files:
            # An index from elsewhere must not reach outside its folder.
            if file.parent != folder or not file.is_file():
                raise InputError(f"{index} names {file.name}, which is not in {folder}.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no *.safetensors weights, the only kind that is read.")
    return files


def _places(cfg: HookedTransformerConfig, biased: frozenset[str]) -> dict[str, tuple[str, View]]:
    """The table for this model: every tensor that its checkpoint must hold, layer by layer."""
    kv = "" if cfg.n_key_value_heads is None else "_"
    places = {}
    for key, (name, view) in TABLE.items():
        if key.endswith(".bias") and key.split(".")[-2] not in biased:
            continue
        for layer in range(cfg.n_layers) if "{layer}" in key else (0,):
            places[key.format(layer=layer)] = name.format(layer=layer, kv=kv), view
    return places


def _why_unknown(key: str) -> str:
    if key.endswith(("gate_proj.bias", "up_proj.bias")):
        return "is a bias inside a gated MLP, which HookedTransformer can't represent"
    return "has no place in the model that config.json describes"


def _viewed(
    file: Path, key: str, tensor: Tensor, view: View, cfg: HookedTransformerConfig, empty: Tensor
) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{file}: {key} holds {kind}; quantised weights are not supported.")
    try:
        value = view(tensor, cfg)
    except (RuntimeError, IndexError):  # it has not the axes or the size to be split
        value = None
    if value is None or value.shape != empty.shape:
        raise InputError(
            f"{file}: {key} has shape {tuple(tensor.shape)}, which does not fit config.json."
        )
    return value.to(cfg.dtype)


def _install_zero_biases(model: HookedTransformer) -> None:
    # TransformerLens always has all biases; here the checkpoint's own are in place already.
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if not name.rpartition(".")[2].lstrip("_").startswith("b_"):
            raise AssertionError(f"The table of weights has no entry for {name}.")
        zeros = torch.zeros(parameter.shape, dtype=model.cfg.dtype, device=model.cfg.device)
        _install(model, name, zeros)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values()):
            return weight_map
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{index} is no index of safetensors shards.")


def _tensors(folder: Path, device: str) -> Iterator[tuple[Path, str, Tensor]]:
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=device) as opened:
                for key in opened.keys():  # noqa: SIM118  (no mapping)
                    yield file, key, opened.get_tensor(key)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged or no safetensors file: {error}.") from None
        except OSError as error:
            raise InputError(f"{file} can't be read: {error.strerror or error}.") from None


def _install(model: nn.Module, name: str, value: Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    module._parameters[parameter_name] = nn.Parameter(value, requires_grad=False)
