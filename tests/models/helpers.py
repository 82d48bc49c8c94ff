"""Tiny random checkpoints, saved by transformers itself."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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


def qwen3(**changes: Any) -> PreTrainedModel:
    return _random(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **changes})))


def mistral(**changes: Any) -> PreTrainedModel:
    return _random(
        MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": None, **changes}))
    )


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64 throughout: transformers' RMS norms work in float32 otherwise."""

    def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        power = hidden.pow(2).mean(-1, keepdim=True)
        return module.weight * hidden / (power + module.variance_epsilon).sqrt()

    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm, module)
    return model


def _random(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights near one, biases and matrices large enough to matter.
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def save(
    model: PreTrainedModel, folder: Path, *, prepends_bos: bool = False, **keywords: Any
) -> Path:
    """Save a model with a word-level tokenizer that knows `w3` to `w39`; `<s>` is 0."""
    model.save_pretrained(folder, **keywords)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 40)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if prepends_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
