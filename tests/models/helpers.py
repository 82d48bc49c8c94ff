"""Tiny random checkpoints, saved by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def llama(**changes: Any) -> PreTrainedModel:
    return _random(LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})))


def qwen2(**changes: Any) -> PreTrainedModel:
    return _random(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})))


def _random(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights near one, biases and matrices large enough to matter.
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, **keywords: Any) -> Path:
    model.save_pretrained(folder, **keywords)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 40)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
