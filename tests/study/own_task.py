"""A task of somebody's own, in files, for models that speak the box task; and a random model that
speaks the tasks that ship."""

import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_shipped import TOKENIZERS
from tl_entity.tasks.nouns import OBJECTS

STAGES = [
    {"group": "mover", "position": "last", "size": 3, "receivers": 2},
    {"group": "finder", "position": "last", "into": "mover", "receiver_input": "q", "size": 2},
    {
        "group": "reader",
        "position": "asked",
        "into": "finder",
        "receiver_input": "v",
        "edges": [["mover", "v"]],
        "size": 2,
    },
]

TEXT = "The [[thing|{}]] is in Box [[label|{}]], the [[thing|{}]] is in Box [[label|{}]]. Box [[asked|{}]] contains the"  # noqa: E501


def save_texts(path: Path, n: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Texts of two boxes; the mark of the right label knows which is asked about."""
    draw, rows = random.Random(seed), list[dict[str, str]]()
    for _ in range(n):
        things, labels = draw.sample(OBJECTS[:60], 4), draw.sample("ABCDEFGHIJKLMNOPQRST", 4)
        asked = draw.randrange(2)
        texts = []
        for some, others in ((things[:2], labels[:2]), (things[2:], labels[2:])):
            marked = [f"[[right|{x}]]" if i == asked else x for i, x in enumerate(others)]
            texts.append(TEXT.format(some[0], marked[0], some[1], marked[1], others[asked]))
        answer = {"answer": things[asked], "foil": things[1 - asked]}
        rows.append({"clean": texts[0], "corrupt": texts[1], **answer})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return rows


def save_recipe(path: Path, **changes: object) -> Path:
    """Three groups, one of which is patched into along two paths."""
    path.write_text(json.dumps({"stages": STAGES, **changes}), encoding="utf-8")
    return path


def save_speaker(folder: Path, *, seed: int) -> Path:
    """A random Llama that speaks the tasks that ship."""
    tokenizer = TOKENIZERS["two digits"]
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
