"""From a Hugging Face configuration to one of TransformerLens, or a refusal that says why."""

import math
from typing import Any

import torch
from transformer_lens import HookedTransformerConfig
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tl_entity._typing import checked
from tl_entity.errors import InputError

ARCHITECTURES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s that are loaded: HookedTransformer represents them exactly, but for what is
refused below, which a TransformerBridge can take."""

ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""What transformers calls an activation, and what TransformerLens calls it."""

ROTARY_TYPES: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
"""The kinds of rotary embedding that HookedTransformer represents."""

MOST, MOST_LAYERS = 2**24, 2**12
"""No checkpoint has larger sizes, or more layers, and to make room for them would take all memory;
with so many positions the rotary tables are gigabytes."""

_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
"""Settings of the rotary embedding that are numbers above 0."""

_MAY_BE_OPEN = frozenset(_ROPE_NUMBERS) - {"rope_theta", "low_freq_factor", "high_freq_factor"}

_OBSTACLES = {
    "cohere": "its attention and MLP run in parallel",
    "deepseek_v3": "its attention has latent vectors and its MLPs are experts",
    "gemma": "its norms scale by one plus their weight",
    "gemma2": "its norms scale by one plus their weight and its logits are capped",
    "gemma3_text": "its norms scale by one plus their weight",
    "gpt_oss": "its attention has sinks and its MLPs are experts",
    "granite": "it scales embeddings, attention and logits by factors of its own",
    "llama4_text": "its MLPs are experts",
    "mixtral": "its MLPs are experts",
    "olmo2": "it normalises after attention and MLP",
    "phi3": "its projections are stored fused",
    "qwen2_moe": "its MLPs are experts",
    "qwen3_moe": "its MLPs are experts",
    "smollm3": "some of its layers have no rotary embedding",
}
"""What keeps the relatives of these families out."""


@checked
def hooked_config(
    config: PretrainedConfig, *, dtype: torch.dtype, device: str, place: str = "The checkpoint"
) -> HookedTransformerConfig:
    """The HookedTransformer configuration that computes what this Hugging Face model computes.

    Nothing is assumed from the model's name: every size and constant is read. `n_ctx` is the
    checkpoint's own `max_position_embeddings`; the rotary tables are all that grows with it.
    `place` names the checkpoint in messages.

    Raises:
        InputError: if the architecture, or a feature of it, cannot be represented exactly.
    """
    check_config(config, place=place)
    _refuse_what_only_huggingface_has(config)
    window, attention_kinds = _windows(config, place)
    n_heads, n_kv_heads, d_head = _heads(config)
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
        act_fn=ACTIVATIONS[config.hidden_act],
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_adjacent_pairs=False,
        use_qk_norm=config.model_type == "qwen3",
        use_local_attn=window is not None,
        window_size=window,
        attn_types=attention_kinds,
        init_weights=False,
        model_name=str(config.model_type),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        # What the tokenizer does, once there is one.
        default_prepend_bos=False,
        tokenizer_prepends_bos=False,
        dtype=dtype,
        device=device,
        **_rope(config, place),
    )


@checked
def check_config(config: PretrainedConfig, *, place: str = "The checkpoint") -> None:
    """Make sure that this is a model of the Llama family, whole and of sizes that make sense: what
    every backend needs. `place` names the checkpoint in messages.

    Raises:
        InputError: saying what it is or has that can't be loaded.
    """
    _refuse_what_differs(config)
    _refuse_what_is_no_size(config, place)
    _refuse_what_is_no_constant(config, place)
    _windows(config, place)
    n_heads, n_kv_heads, d_head = _heads(config)
    if n_heads % n_kv_heads:
        raise InputError(
            f"{place} has {n_heads} heads that can't share {n_kv_heads} key-value heads evenly."
        )
    if d_head % 2:
        raise InputError(f"{place} has heads of odd size {d_head}, which can't be rotated.")


def biased_projections(config: PretrainedConfig) -> frozenset[str]:
    """The attention projections (`q_proj` to `o_proj`) that have a bias in this model."""
    if config.model_type == "qwen2":
        return frozenset({"q_proj", "k_proj", "v_proj"})
    if config.model_type in ("llama", "qwen3") and getattr(config, "attention_bias", False):
        return frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
    return frozenset()


def _refuse_what_differs(config: PretrainedConfig) -> None:
    if config.model_type not in ARCHITECTURES:
        obstacle = _OBSTACLES.get(config.model_type)
        why = f" ({obstacle})" if obstacle else ""
        raise InputError(
            f"The checkpoint is of architecture {config.model_type!r}{why}; "
            f"those supported are {', '.join(ARCHITECTURES)}."
        )
    rope = _rope_parameters(config)
    rotated = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0)
    reasons = {
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
        # Of these families, transformers itself passes over the setting or can't run.
        "only a part of each head is rotated": rotated not in (None, 1.0),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"This checkpoint can't be loaded: {reason}.")


def _refuse_what_only_huggingface_has(config: PretrainedConfig) -> None:
    rope = _rope_parameters(config)["rope_type"]
    reasons = {
        # In the other families transformers passes over the setting.
        "its MLP has biases on gate_proj and up_proj": config.model_type == "llama"
        and bool(getattr(config, "mlp_bias", False)),
        f"its activation is {config.hidden_act!r}": config.hidden_act not in ACTIVATIONS,
        f"its rotary embedding is of type {rope!r}, and those supported are "
        f"{', '.join(ROTARY_TYPES)}": rope not in ROTARY_TYPES,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(
                f"HookedTransformer can't represent this checkpoint: {reason}; load it with "
                'backend="bridge", and use engine="hooks".'
            )


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Heads, key-value heads, and the size of a head."""
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    return n_heads, n_kv_heads, getattr(config, "head_dim", None) or config.hidden_size // n_heads


def _refuse_what_is_no_size(config: PretrainedConfig, place: str) -> None:
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ):
        size = getattr(config, name, None)
        # Key-value heads and the size of a head follow from the others where they are not given.
        optional = name in ("num_key_value_heads", "head_dim")
        if size is None and optional:
            continue
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{place} has {name} {size!r}; it must be a positive number.")
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST
        if size > most:
            raise InputError(f"{place} has {name} {size}; no more than {most} are taken.")


def _refuse_what_is_no_constant(config: PretrainedConfig, place: str) -> None:
    eps = config.rms_norm_eps
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise InputError(f"{place} has rms_norm_eps {eps!r}; it must be a small number.")
    rope = _rope_parameters(config)
    for name in _ROPE_NUMBERS:
        given = rope.get(name, 1.0)
        # Of yarn most may be left open.
        if given is None and name in _MAY_BE_OPEN:
            continue
        if isinstance(given, bool) or not (
            isinstance(given, (int, float)) and 0 < given < math.inf
        ):
            raise InputError(
                f"The rotary embedding of {place} has {name} {given!r}; it must be a positive "
                "number."
            )


def _windows(config: PretrainedConfig, place: str) -> tuple[int | None, list[str] | None]:
    """How many keys a query sees at most, and which layers ("local") that holds for."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    # Qwen may set a window and not use it, or use it in some layers only.
    if config.model_type == "llama" or (
        config.model_type.startswith("qwen") and not getattr(config, "use_sliding_window", False)
    ):
        window = None
    if window is None:
        if any(kind != "full_attention" for kind in kinds or ()):
            raise InputError(
                f"{place} has layers that attend to a window, but no size of the window."
            )
        return None, None
    if not isinstance(window, int) or window < 1:
        raise InputError(f"{place} has sliding_window {window!r}; it must be a positive number.")
    if kinds is None:
        return window, ["local"] * config.num_hidden_layers
    names = {"full_attention": "global", "sliding_attention": "local"}
    unknown = [kind for kind in kinds if kind not in names]
    if unknown:
        raise InputError(f"{place} has layers of the unknown kind {unknown[0]!r}.")
    if len(kinds) != config.num_hidden_layers:
        raise InputError(
            f"{place} has {len(kinds)} layer_types for {config.num_hidden_layers} layers."
        )
    local = [names[kind] for kind in kinds]
    return (window, local) if "local" in local else (None, None)


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    # transformers 5 keeps all in rope_parameters; 4 has rope_theta and rope_scaling.
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = {"rope_theta": getattr(config, "rope_theta", 10000.0), **given}
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _rope(config: PretrainedConfig, place: str) -> dict[str, Any]:
    """The rotary embedding, of one of `ROTARY_TYPES`, as fields of HookedTransformerConfig."""
    rope = _rope_parameters(config)
    try:
        base = {"rotary_base": rope["rope_theta"]}
        match rope["rope_type"]:
            case "linear":
                return base | {"rotary_scaling_factor": rope["factor"]}
            case "llama3":
                return base | {
                    "use_NTK_by_parts_rope": True,
                    "NTK_by_parts_factor": rope["factor"],
                    "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
                    "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
                    "NTK_original_ctx_len": rope["original_max_position_embeddings"],
                }
            case "yarn":
                # The factor on cos and sin has several spellings, which transformers resolves.
                _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
                longest = config.max_position_embeddings
                trained = rope.get("original_max_position_embeddings") or longest
                return base | {
                    "use_yarn_rope": True,
                    "yarn_factor": rope["factor"] or longest / trained,
                    "yarn_attention_factor": attention_factor,
                    "yarn_beta_fast": rope.get("beta_fast") or 32.0,
                    "yarn_beta_slow": rope.get("beta_slow") or 1.0,
                    "yarn_truncate": rope.get("truncate", True),
                    "yarn_original_max_position_embeddings": trained,
                }
            case _:
                return base
    except KeyError as error:
        raise InputError(f"The rotary embedding of {place} lacks {error}.") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"The rotary embedding of {place} can't be computed from its settings: {error}."
        ) from None
