"""Checkpoint tensors as TransformerLens parameters: views of the file, never copies."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity.errors import InputError
from tl_entity.hooks.points import n_kv_heads

View = Callable[[Tensor, HookedTransformerConfig], Tensor]

IGNORED = ("rotary_emb.inv_freq",)
"""Tensors of old checkpoints that are computed from the configuration."""


def _as_is(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor


def _transposed(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor.T


def _split_heads(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    # [head * d_head, d_model] as [head, d_model, d_head]
    return tensor.view(-1, cfg.d_head, cfg.d_model).transpose(1, 2)


def _split_bias(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor.view(-1, cfg.d_head)


def _split_output(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    # [d_model, head * d_head] as [head, d_head, d_model]
    return tensor.view(cfg.d_model, cfg.n_heads, cfg.d_head).permute(1, 2, 0)


GLOBAL: dict[str, tuple[str, View]] = {
    "model.embed_tokens.weight": ("embed.W_E", _as_is),
    "model.norm.weight": ("ln_final.w", _as_is),
    "lm_head.weight": ("unembed.W_U", _transposed),
}
"""Hugging Face's name, TransformerLens's name, and how one is seen as the other."""

PER_LAYER: dict[str, tuple[str, View]] = {
    "input_layernorm.weight": ("ln1.w", _as_is),
    "post_attention_layernorm.weight": ("ln2.w", _as_is),
    "self_attn.q_proj.weight": ("attn.W_Q", _split_heads),
    "self_attn.k_proj.weight": ("attn.{kv}W_K", _split_heads),
    "self_attn.v_proj.weight": ("attn.{kv}W_V", _split_heads),
    "self_attn.o_proj.weight": ("attn.W_O", _split_output),
    "self_attn.q_proj.bias": ("attn.b_Q", _split_bias),
    "self_attn.k_proj.bias": ("attn.{kv}b_K", _split_bias),
    "self_attn.v_proj.bias": ("attn.{kv}b_V", _split_bias),
    "self_attn.o_proj.bias": ("attn.b_O", _as_is),
    "mlp.gate_proj.weight": ("mlp.W_gate", _transposed),
    "mlp.up_proj.weight": ("mlp.W_in", _transposed),
    "mlp.down_proj.weight": ("mlp.W_out", _transposed),
}
"""The same for `model.layers.N.*` and `blocks.N.*`; `{kv}` is `_` under grouped-query attention."""

ABSENT_MEANS_ZERO = ("attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out")
"""Biases that TransformerLens always has and checkpoints mostly have not."""


def install_weights(
    model: HookedTransformer, folder: Path, *, dtype: torch.dtype, device: str, tied: bool
) -> None:
    """Give a model without weights (on the meta device) those of a folder of safetensors.

    Each parameter becomes a view of the tensor in the memory-mapped file, in the checkpoint's own
    layout; only another dtype or device makes a copy.

    Raises:
        InputError: naming the file and the tensor, if a file is damaged, a tensor is unknown, has
            another shape than the configuration says, appears twice, or is missing.
    """
    cfg = model.cfg
    seen: dict[str, Path] = {}
    for file, key, tensor in _tensors(folder, device):
        if key.endswith(IGNORED):
            continue
        target = _target(key, cfg)
        if target is None:
            raise InputError(f"{file}: the tensor {key} has no place in this architecture.")
        name, view = target
        if name in seen:
            raise InputError(f"{file}: the tensor {key} is also in {seen[name]}.")
        seen[name] = file
        expected = model.get_parameter(name).shape
        try:
            value = view(tensor, cfg)
        except RuntimeError:
            value = tensor
        if value.shape != expected:
            raise InputError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, "
                f"which does not fit the sizes in config.json (needed for {name}: "
                f"{tuple(expected)})."
            )
        _install(model, name, value.to(dtype))
    if tied and "unembed.W_U" not in seen:
        _install(model, "unembed.W_U", model.embed.W_E.T)
    missing = []
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            continue
        if name.replace("._", ".").endswith(ABSENT_MEANS_ZERO) or name == "unembed.b_U":
            _install(model, name, torch.zeros(parameter.shape, dtype=dtype, device=device))
        else:
            missing.append(name)
    if missing:
        raise InputError(
            f"{folder} lacks weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those its index names if it has one.

    Raises:
        InputError: if there are none, or the index is damaged or names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_index(index).values()))
        files = [folder / name for name in names]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise InputError(f"{index} names {file.name}, which is not in {folder}.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in files:
        return [single]
    if not files:
        raise InputError(f"{folder} holds no *.safetensors weights.")
    return files


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


def _target(key: str, cfg: HookedTransformerConfig) -> tuple[str, View] | None:
    if key in GLOBAL:
        return GLOBAL[key]
    prefix, _, rest = key.partition("model.layers.")
    layer, _, part = rest.partition(".")
    if prefix or not layer.isdigit() or int(layer) >= cfg.n_layers or part not in PER_LAYER:
        return None
    name, view = PER_LAYER[part]
    kv = "_" if n_kv_heads(cfg) != cfg.n_heads else ""
    return f"blocks.{layer}.{name.format(kv=kv)}", view


def _install(model: nn.Module, name: str, value: Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    module._parameters[parameter_name] = nn.Parameter(value, requires_grad=False)
