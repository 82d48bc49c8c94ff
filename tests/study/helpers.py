"""A tiny random checkpoint that speaks the box task, in a folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tl_entity.training.tokenizer import VOCABULARY, save_tokenizer

N_LAYERS, N_HEADS = 3, 4


def save_tiny_model(folder: Path, *, seed: int, **changes: Any) -> Path:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
        **changes,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
