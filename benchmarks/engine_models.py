"""The models and prompts that the engines are timed on."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity import PairBatch, discovery_pairs, load_model
from tl_entity.planning.plan import box_layout

SMOLLM2 = {
    "n_layers": 30,
    "d_model": 576,
    "n_heads": 9,
    "n_kv_heads": 3,
    "d_mlp": 1536,
    "d_vocab": 49152,
}
"""SmolLM2-135M's sizes."""

RANDOM: dict[str, dict[str, int]] = {
    "random-256": {"n_layers": 8, "d_model": 256, "n_heads": 8, "n_kv_heads": 8, "d_mlp": 704},
    "random-512": {"n_layers": 8, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_mlp": 1408},
    "random-1024": {"n_layers": 8, "d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "d_mlp": 2816},
    "random-llama-7b": {
        "n_layers": 32,
        "d_model": 4096,
        "n_heads": 32,
        "n_kv_heads": 32,
        "d_mlp": 11008,
        "d_vocab": 32000,
    },
    "random-qwen3": {**SMOLLM2, "use_qk_norm": True},
    "random-mistral": {**SMOLLM2, "window_size": 32},
}
"""Llamas of random weights, made on the device. Of SmolLM2's sizes one that normalises queries and
keys, and one whose window is shorter than the prompts."""


def model_and_pairs(name: str, options: argparse.Namespace) -> tuple[HookedTransformer, PairBatch]:
    """A model by name, folder, or as one of random weights, and its prompts."""
    if name in RANDOM:
        model = random_llama(RANDOM[name], options.device)
    else:
        model = load_model(name, device=options.device)
    return model, prompts_of(model, name, options.prompts, options.boxes)


def prompts_of(model: HookedTransformer, name: str, n_prompts: int, n_boxes: int) -> PairBatch:
    """Box prompts, or for a model of random weights random tokens of their form."""
    if name in RANDOM or model.tokenizer is None:
        return random_pairs(model, n_prompts, n_boxes)
    pairs = discovery_pairs(model.tokenizer, n_prompts, n_boxes=n_boxes, seed=0)
    return pairs.to(model.cfg.device or "cpu")


def llama_config(sizes: Mapping[str, int], device: str) -> HookedTransformerConfig:
    """The configuration of a Llama of some sizes."""
    n_heads, n_kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    d_head = sizes.get("d_head", sizes["d_model"] // n_heads)
    window = sizes.get("window_size")
    return HookedTransformerConfig(
        n_layers=sizes["n_layers"],
        d_model=sizes["d_model"],
        n_heads=n_heads,
        n_key_value_heads=None if n_kv_heads == n_heads else n_kv_heads,
        d_head=d_head,
        d_mlp=sizes["d_mlp"],
        d_vocab=sizes.get("d_vocab", 8192),
        n_ctx=512,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        default_prepend_bos=False,
        init_weights=False,
        device=device,
        use_qk_norm=bool(sizes.get("use_qk_norm")),
        use_local_attn=window is not None,
        window_size=window,
        attn_types=None if window is None else ["local"] * sizes["n_layers"],
    )


def random_llama(sizes: Mapping[str, int], device: str, seed: int = 0) -> HookedTransformer:
    """A Llama of random weights, laid out in memory as a loaded checkpoint's are."""
    cfg = llama_config(sizes, device)
    # Only parameters are made later, in place, where they belong.
    with init_empty_weights(include_buffers=False):
        model = HookedTransformer(cfg, move_to_device=False)
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        weights = torch.empty(rows, columns, device=device)
        return weights.normal_(0, columns**-0.5, generator=generator)

    for name, parameter in list(model.named_parameters()):
        shape = parameter.shape
        if name.endswith(("W_Q", "W_K", "W_V")):
            heads, d_model, size = shape
            weights = matrix(heads * size, d_model).view(heads, size, d_model).transpose(1, 2)
        elif name.endswith("W_O"):
            heads, size, d_model = shape
            weights = matrix(d_model, heads * size).view(d_model, heads, size).permute(1, 2, 0)
        elif parameter.ndim == 2 and not name.endswith("W_E"):
            weights = matrix(shape[1], shape[0]).T
        elif parameter.ndim == 2:
            weights = matrix(*shape) * shape[1] ** 0.5
        else:
            weights = torch.full(shape, float("ln" in name or "norm" in name), device=device)
        set_parameter(model, name, weights)
    model.to(device, print_details=False)
    return model.requires_grad_(False).eval()


def set_parameter(model: HookedTransformer, name: str, weights: Tensor) -> None:
    """Put weights, as they lie in memory, in a parameter's place."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    module.register_parameter(last, torch.nn.Parameter(weights, requires_grad=False))


def random_pairs(model: HookedTransformer, n_prompts: int, n_boxes: int) -> PairBatch:
    """Random tokens in the form of box prompts."""
    pairs = box_layout(n_prompts, n_boxes=n_boxes)
    generator = torch.Generator().manual_seed(0)

    def filled(batch: Any) -> Any:
        tokens = torch.randint(model.cfg.d_vocab, batch.tokens.shape, generator=generator)
        return replace(batch, tokens=tokens, answers=tokens[:, 0].clone())

    clean, corrupt = filled(pairs.clean), filled(pairs.corrupt)
    return PairBatch(clean, corrupt, clean.answers).to(model.cfg.device or "cpu")


def noisy_copy(model: HookedTransformer) -> HookedTransformer:
    """A model of the same sizes that computes something else: one per cent of noise on `W_O`."""
    with init_empty_weights(include_buffers=False):
        other = HookedTransformer(replace_config(model.cfg), move_to_device=False)
    generator = torch.Generator(model.W_E.device).manual_seed(1)
    for name, parameter in list(model.named_parameters()):
        weights = parameter.data
        if name.endswith("W_O"):
            noise = torch.empty_like(weights).normal_(generator=generator)
            weights = weights + 0.01 * weights.std() * noise
        set_parameter(other, name, weights)
    for here, there in zip(other.blocks, model.blocks, strict=True):
        for table in ("rotary_cos", "rotary_sin"):
            setattr(here.attn, table, getattr(there.attn, table))
    other.to(model.W_E.device, print_details=False)
    other.tokenizer = model.tokenizer
    return other.requires_grad_(False).eval()


def replace_config(cfg: HookedTransformerConfig) -> HookedTransformerConfig:
    return HookedTransformerConfig.from_dict({**cfg.to_dict(), "init_weights": False})


def title(name: str) -> str:
    """A model's name without its place on this machine."""
    return name if name in RANDOM else Path(name).name
