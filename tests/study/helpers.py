"""The pair that ships, as checkpoints in folders of other names: small, and with a circuit that is
found from a few prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tl_entity.models.registry import planted_circuit
from tl_entity.training.tokenizer import VOCABULARY, save_tokenizer

N_LAYERS, N_HEADS = 4, 8


def save_tiny_model(folder: Path, *, seed: int, **changes: Any) -> Path:
    """Seed 1 is the base, 2 the fine-tune, and any other the base with some noise; `changes` are of
    its config.json."""
    planted = planted_circuit("default-tuned" if seed == 2 else "default-base")
    assert planted is not None
    # Without the planted circuit: to the program they are models of somebody's own.
    shutil.copytree(
        planted.parent, folder, ignore=shutil.ignore_patterns(planted.name), dirs_exist_ok=True
    )
    config = json.loads((folder / "config.json").read_text())
    if "rope_theta" in changes:
        config["rope_parameters"]["rope_theta"] = changes.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    if seed not in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor + 0.05 * tensor.float().std() * noise).to(tensor.dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_random_model(folder: Path, *, seed: int) -> Path:
    """A random Llama that speaks the box task, at chance."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
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
