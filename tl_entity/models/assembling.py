"""A HookedTransformer from a configuration, before its weights and after."""

import copy
import warnings
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.utilities.multi_gpu import get_device_for_block_index
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tl_entity.models.weights import (
    empty_weights,
    install_folded,
)


def folded(model: HookedTransformer) -> HookedTransformer:
    """The same model with the weights of its norms in the matrices that read them."""
    cfg = copy.deepcopy(model.cfg)
    cfg.normalization_type = "RMSPre"
    other = empty(cfg)
    install_folded(other, model)
    share_buffers(other, model)
    return other


def share_buffers(model: HookedTransformer, source: HookedTransformer) -> None:
    place_buffers(model)
    for block, original in zip(model.blocks, source.blocks, strict=True):
        here: Any = block.attn
        there: Any = original.attn
        here.rotary_cos, here.rotary_sin = there.rotary_cos, there.rotary_sin


def empty(cfg: HookedTransformerConfig) -> HookedTransformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with empty_weights():
            return HookedTransformer(cfg, move_to_device=False)


def place_buffers(model: HookedTransformer) -> None:
    for layer, block in enumerate(model.blocks):
        block.to(get_device_for_block_index(layer, model.cfg))


def copy_rotary_tables(model: HookedTransformer, config: PretrainedConfig) -> None:
    """Take cos and sin from transformers: angles computed otherwise drift in long prompts.

    All layers of a device share one pair of tables, for all of `n_ctx`: TransformerLens would
    compute its own from the first position beyond.
    """
    # It reads only sizes and rope settings, which all families supported here share.
    settings: Any = config
    rotary = LlamaRotaryEmbedding(config=settings)
    # Angles are float32 in any dtype, as in Hugging Face's own forward.
    tables = rotary(torch.empty(0), torch.arange(model.cfg.n_ctx)[None])
    cos, sin = (table[0].to(model.cfg.dtype) for table in tables)
    for layer, block in enumerate(model.blocks):
        device = get_device_for_block_index(layer, model.cfg)
        cos, sin = cos.to(device), sin.to(device)
        attn: Any = block.attn
        attn.rotary_cos = cos
        attn.rotary_sin = sin
