"""From a Hugging Face configuration to one of TransformerLens, or a refusal that says why."""

from typing import Any

import torch
from transformer_lens import HookedTransformerConfig
from transformers import PretrainedConfig

from tl_entity._typing import checked
from tl_entity.errors import InputError

ARCHITECTURES: tuple[str, ...] = ("llama", "mistral", "qwen2")
"""The `model_type`s that HookedTransformer represents exactly."""


@checked
def hooked_config(
    config: PretrainedConfig, *, dtype: torch.dtype, device: str
) -> HookedTransformerConfig:
    """The HookedTransformer configuration that computes what this Hugging Face model computes.

    Nothing is assumed from the model's name: every size and constant is read.

    Raises:
        InputError: if the architecture, or a feature of it, cannot be represented exactly.
    """
    _refuse_what_differs(config)
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_key_value_heads=None if n_kv_heads == n_heads else n_kv_heads,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        default_prepend_bos=False,
        init_weights=False,
        model_name=str(config.model_type),
        original_architecture=(config.architectures or [None])[0],
        tokenizer_prepends_bos=False,
        dtype=dtype,
        device=device,
        **_rope(config),
    )


def _refuse_what_differs(config: PretrainedConfig) -> None:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            f"The checkpoint is of architecture {kind!r}; "
            f"those supported are {', '.join(ARCHITECTURES)}."
        )
    reasons = {
        "its attention slides over a window": bool(
            getattr(config, "sliding_window", None)
            and getattr(config, "use_sliding_window", kind == "mistral")
        ),
        "its MLP has biases, which have no place in a gated MLP": bool(
            getattr(config, "mlp_bias", False)
        ),
        f"its activation is {config.hidden_act!r}": config.hidden_act not in ("silu", "gelu"),
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
        "only a part of each head is rotated": getattr(config, "partial_rotary_factor", 1.0) != 1.0,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"HookedTransformer can't represent this checkpoint: {reason}.")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The checkpoint's rotary embedding, in the names that transformers uses since version 5."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = {"rope_theta": getattr(config, "rope_theta", 10000.0), **given}
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope = rope_parameters(config)
    base = {"rotary_base": rope["rope_theta"]}
    kind = rope["rope_type"]
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"rotary_scaling_factor": rope["factor"]}
    if kind == "llama3":
        return base | {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    if kind == "yarn":
        # The tables are copied from transformers afterwards; here only the kind is recorded.
        return base
    raise InputError(
        f"The checkpoint's rotary embedding is of type {kind!r}; "
        "those supported are default, linear, llama3 and yarn."
    )
