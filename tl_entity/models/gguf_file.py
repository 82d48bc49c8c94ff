"""GGUF files: their header as a transformers configuration, their tensors in Hugging Face's layout.

The header is read here, because a file's sizes, rotary scaling and biases are all that says what
the model computes, and nothing may be lost of it. Blocks of quantised numbers are decoded by the
`gguf` package, a few rows at a time.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tl_entity.errors import InputError
from tl_entity.models.checkpoint import Checkpoint
from tl_entity.models.files import reason
from tl_entity.models.gguf_header import MOST_ITEMS as MOST_ITEMS
from tl_entity.models.gguf_header import PLAIN as PLAIN
from tl_entity.models.gguf_header import Header as Header
from tl_entity.models.gguf_header import Stored as Stored
from tl_entity.models.gguf_header import mapped_file
from tl_entity.models.gguf_header import read_header as read_header
from tl_entity.models.tokenizers import read_tokenizer

DECODED_BYTES = 2**22
"""About how many bytes of float32 are decoded at a time."""


_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def gguf_checkpoint(file: Path) -> Checkpoint:
    """A GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model, quantised or not.

    Raises:
        InputError: if the file is damaged, or says what can't be represented.
    """
    header = read_header(file)
    config = _config(header)

    def tensors() -> Iterator[tuple[str, str, Tensor]]:
        mapped = mapped_file(file)
        for name, stored in header.tensors.items():
            if name == _ROPE_FACTORS:
                continue
            tensor = _read_tensor(file, name, stored, mapped)
            yield str(file), _hugging_face_name(name), _in_hugging_face_order(name, tensor, header)

    return Checkpoint(str(file), config, tensors, lambda: _tokenizer(header))


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file.

    Raises:
        InputError: if the file is damaged or has none.
    """
    return _tokenizer(read_header(file))


def _tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer beside the file if it is the same vocabulary, or else the one inside it.

    One beside it is the original; a GGUF file describes how text is split by a mere name.
    """
    file = header.file
    if any((file.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        beside = read_tokenizer(file.parent)
        if _same_vocabulary(beside, header):
            return beside
    with TemporaryDirectory() as alone:
        # From its own folder transformers would read what lies beside it after all.
        (Path(alone) / file.name).symlink_to(file.resolve())
        tokenizer: Any = read_tokenizer(Path(alone), file)
    if header.values.get("tokenizer.ggml.pre") == "smollm":
        # transformers does not know this name and would not split numbers into digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def _same_vocabulary(tokenizer: PreTrainedTokenizerBase, header: Header) -> bool:
    tokens = header.values.get("tokenizer.ggml.tokens") or []
    vocabulary = tokenizer.get_vocab()
    # Places that fill the embedding up have no token in the original.
    return len(vocabulary) <= len(tokens) and all(
        index < len(tokens) and tokens[index] == token for token, index in vocabulary.items()
    )


def _config(header: Header) -> PretrainedConfig:
    file = header.file
    if header.get("expert_count"):
        raise InputError(f"{file} can't be represented: its MLPs are experts.")
    if (header.values.get("split.count") or 1) > 1:
        raise InputError(f"{file} is one part of a split model; merge the parts with gguf-split.")
    heads = header.need("attention.head_count")
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"{file} has attention.head_count {heads!r}; it must be one number.")
    width = header.need("embedding_length")
    if not isinstance(width, int) or width < 1:
        raise InputError(f"{file} has embedding_length {width!r}; it must be a number.")
    d_head = header.get("attention.key_length", width // heads)
    if header.get("attention.value_length", d_head) != d_head:
        raise InputError(f"{file} can't be represented: values are of another size than keys.")
    if header.get("rope.dimension_count", d_head) != d_head:
        raise InputError(f"{file} can't be represented: only a part of each head is rotated.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{file} lacks the weights token_embd.weight.")
    window = header.get("attention.sliding_window")
    biased = "blk.0.attn_q.bias" in header.tensors
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": header.need("feed_forward_length"),
        "num_hidden_layers": header.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": d_head,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": header.need("context_length"),
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    match header.architecture:
        case "llama" if window:
            kind = MistralConfig
            settings["sliding_window"] = window
        case "llama":
            kind = LlamaConfig
            settings["attention_bias"] = biased
        case "qwen2":
            kind = Qwen2Config
        case "qwen3":
            kind = Qwen3Config
            settings["attention_bias"] = biased
        case other:
            raise InputError(
                f"{file} is of architecture {other!r}; those supported in GGUF files are llama "
                "(which Mistral is there), qwen2, qwen3."
            )
    try:
        config = kind(**settings, rope_parameters=_rope(header))
        _check_rope_factors(header, config)
    except InputError:
        raise
    except Exception as error:  # what transformers finds wrong with the values
        raise InputError(f"{file} describes no model: {reason(error)}") from None
    return config


def _rope(header: Header) -> dict[str, Any]:
    base = {"rope_theta": header.get("rope.freq_base", 10000.0)}
    kind = header.get("rope.scaling.type", "none")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    original = header.get("rope.scaling.original_context_length")
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        value = header.get(f"rope.scaling.{name}")
        usual = (0.0, 0.1) if name == "yarn_log_multiplier" else (1.0, -1.0)
        if value is not None and value not in usual:
            raise InputError(f"{header.file} has rope.scaling.{name} {value}, not supported.")
    if _ROPE_FACTORS in header.tensors:
        return base | _llama3(header)
    match kind:
        case "none" if factor in (None, 0.0, 1.0):
            return base | {"rope_type": "default"}
        case "none" | "linear":
            return base | {"rope_type": "linear", "factor": factor or 1.0}
        case "yarn":
            given = {
                "rope_type": "yarn",
                "factor": header.need("rope.scaling.factor"),
                "original_max_position_embeddings": original,
                "beta_fast": header.get("rope.scaling.yarn_beta_fast"),
                "beta_slow": header.get("rope.scaling.yarn_beta_slow"),
            }
            return base | {name: value for name, value in given.items() if value is not None}
        case _:
            pass
    raise InputError(
        f"{header.file} has a rotary embedding of type {kind!r}; those supported are linear, yarn "
        "and that of Llama 3."
    )


def _llama3(header: Header) -> dict[str, Any]:
    """The settings behind the factors by which a file divides its rotary frequencies.

    The file holds the factors alone; the largest is the settings' factor, and the others are those
    that all Llama 3 models share. `_check_rope_factors` makes sure of it.
    """
    factors = _rope_factors(header)
    return {
        "rope_type": "llama3",
        "factor": round(factors.max().item(), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _rope_factors(header: Header) -> Tensor:
    stored = header.tensors[_ROPE_FACTORS]
    return _read_tensor(header.file, _ROPE_FACTORS, stored, mapped_file(header.file)).float()


def _check_rope_factors(header: Header, config: PretrainedConfig) -> None:
    if _ROPE_FACTORS not in header.tensors:
        return
    found = _rope_factors(header)
    cpu = torch.device("cpu")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, cpu)
    d_head, theta = config.head_dim, config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
    if found.shape != scaled.shape or not torch.allclose(plain / scaled, found, rtol=1e-3):
        raise InputError(
            f"{header.file} can't be represented: its {_ROPE_FACTORS} are not those of a Llama 3 "
            "model."
        )


def _hugging_face_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _in_hugging_face_order(name: str, tensor: Tensor, header: Header) -> Tensor:
    """Files of architecture llama rotate neighbours: their query and key rows come in pairs."""
    if header.architecture != "llama" or not (".attn_q." in name or ".attn_k." in name):
        return tensor
    kind = "head_count" if ".attn_q." in name else "head_count_kv"
    heads = header.get(f"attention.{kind}", header.get("attention.head_count"))
    if len(tensor) % (2 * heads):
        return tensor  # of a wrong shape, which is said where shapes are checked
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _read_tensor(file: Path, name: str, stored: Stored, mapped: np.ndarray) -> Tensor:
    block, block_bytes = GGML_QUANT_SIZES[stored.kind]
    count = math.prod(stored.shape)
    row = stored.shape[-1] if stored.shape else 1
    n_bytes = count // block * block_bytes
    if row % block or stored.offset + n_bytes > len(mapped):
        raise InputError(f"{file} is damaged: {name} does not fit into the file.")
    data = mapped[stored.offset : stored.offset + n_bytes]
    if stored.kind in PLAIN:
        return torch.from_numpy(data).view(PLAIN[stored.kind]).reshape(stored.shape)
    values = torch.empty(stored.shape)
    out, blocks = values.view(-1, block), data.reshape(-1, block_bytes)
    step = max(1, DECODED_BYTES // (4 * block))
    try:
        for start in range(0, len(out), step):
            # As one long row: the package loops over rows in Python.
            part = dequantize(blocks[start : start + step].reshape(1, -1), stored.kind)
            out[start : start + step] = torch.from_numpy(part).view(-1, block)
    except NotImplementedError:
        kind = stored.kind.name
        raise InputError(f"{file}: {name} is stored as {kind}, which is not supported.") from None
    return values
