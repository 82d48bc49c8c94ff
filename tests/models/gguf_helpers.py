"""GGUF files of tiny models, laid out as llama.cpp's converter does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 40))]

BYTE_TOKENS = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
"""Every byte, and one merge."""


def gguf_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    *,
    kind: Kind = Kind.F32,
    values: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    drop: Sequence[str] = (),
    byte_level: str | None = None,
) -> PreTrainedModel:
    """Write a model, its matrices as `kind`; returns it with the numbers that the file holds.

    Args:
        model: changed in place to what the file holds.
        file: where to write.
        kind: of matrices; norms and biases are float32.
        values: added to the header, or in place of what it would have.
        tensors: added to the model's.
        drop: values and tensors to leave out.
        byte_level: the name of a way to split text; the vocabulary is then `BYTE_TOKENS`.
    """
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, arch)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    header: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": d_head,
        "attention.value_length": d_head,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": d_head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    for name, value in {**header, **(values or {})}.items():
        if name in drop:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{arch}.{name}", value)
    if byte_level is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(TOKENS)
        writer.add_token_scores([0.0] * len(TOKENS))
        writer.add_token_types([3, 3, 2, *([1] * 37)])
        writer.add_unk_token_id(2)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(byte_level)
        writer.add_token_list(BYTE_TOKENS)
        writer.add_token_types([3, 3, *([1] * (len(BYTE_TOKENS) - 2))])
        writer.add_token_merges(["1 2"])
        writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if gguf_name(name) in drop:
                continue
            data, stored = parameter.float().numpy(), Kind.F32
            if parameter.ndim == 2:
                stored = kind
                data = data if kind == Kind.F32 else quantize(data, kind)
                exact = data if kind == Kind.F32 else dequantize(data, kind)
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(exact)))
            if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
                data = _pairs(data, heads if ".q_proj." in name else kv_heads)
            shape = None if stored in (Kind.F32, Kind.F16) else data.shape
            writer.add_tensor(
                gguf_name(name), data, raw_shape=shape, raw_dtype=None if shape is None else stored
            )
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with its two halves interleaved."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape).copy()
