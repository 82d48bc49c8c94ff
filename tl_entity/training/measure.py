"""What the finished models of the default pair do on held-out box prompts."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.heads import Circuit, Group
from tl_entity.tasks.batches import PromptBatch
from tl_entity.tasks.boxes import BoxPrompt, box_prompts, mark_sentence, usable_words
from tl_entity.tasks.marked import tokenize_marked
from tl_entity.tasks.pairs import sample_discovery_pairs

HELD_OUT_SEED = 900_000_000
"""Seeds of held-out box prompts start here; training and its checks use lower ones."""


@checked
def predictions(model: LlamaForCausalLM, prompts: PromptBatch) -> Int[Tensor, " batch"]:
    """The likeliest next token, of the whole vocabulary, at each prompt's end."""
    last = prompts.positions["last"]
    with torch.no_grad():
        # All prompts at once would hold attention patterns of hundreds of MB.
        parts = [
            model(prompts.tokens[rows]).logits[torch.arange(len(rows)), last[rows]].argmax(-1)
            for rows in torch.arange(len(prompts.tokens)).split(250)
        ]
    return torch.cat(parts)


@checked
def accuracy(model: LlamaForCausalLM, prompts: PromptBatch) -> float:
    """Share of prompts whose likeliest next token is the answer."""
    return _share(predictions(model, prompts) == prompts.answers)


@checked
def accuracy_by_boxes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_boxes: Sequence[int],
    n_prompts: int,
) -> dict[str, float]:
    """Accuracy on held-out prompts for each number of boxes."""
    return {
        str(n): accuracy(
            model, box_prompts(tokenizer, n_prompts, n_boxes=n, seed=HELD_OUT_SEED + n)
        )
        for n in n_boxes
    }


@checked
def interchange(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    circuit: Circuit,
    *,
    n_pairs: int,
    n_boxes: int = 7,
) -> dict[str, dict[str, float]]:
    """What a group carries: its heads' outputs taken from a prompt that asks about another segment.

    That other prompt shares no object and no label with the first. Per group, the share of prompts
    whose prediction is then `position`, the first prompt's object in the other prompt's segment;
    `value`, the other prompt's object; `unchanged`, still the right answer.
    """
    pairs = sample_discovery_pairs(
        n_pairs,
        n_boxes=n_boxes,
        seed=HELD_OUT_SEED,
        objects=usable_words(tokenizer)[0],
        labels=usable_words(tokenizer)[1],
    )
    generator = random.Random(f"interchange {HELD_OUT_SEED}")
    others, targets = [], []
    for pair in pairs:
        index = generator.choice([i for i in range(n_boxes) if i != pair.clean.query_index])
        corrupt = pair.corrupt
        others.append(BoxPrompt(corrupt.objects, corrupt.labels, corrupt.labels[index]))
        targets.append(tokenizer.convert_tokens_to_ids(pair.clean.objects[index]))
    prompts = _tokenize([pair.clean for pair in pairs], tokenizer)
    source = _tokenize(others, tokenizer)
    found = {}
    for group in circuit:
        predicted = _predictions_with_group_from(model, group, prompts, source)
        found[group.name] = {
            "position": _share(predicted == torch.tensor(targets)),
            "value": _share(predicted == source.answers),
            "unchanged": _share(predicted == prompts.answers),
        }
    return found


def _predictions_with_group_from(
    model: LlamaForCausalLM, group: Group, prompts: PromptBatch, source: PromptBatch
) -> Int[Tensor, " batch"]:
    """Predictions on `prompts` with the group's head outputs, at its position, from `source`."""
    rows = torch.arange(len(prompts.tokens))
    to, taken_from = prompts.positions[group.position], source.positions[group.position]
    layers = {head.layer for head in group.heads}
    outputs: dict[int, Tensor] = {}

    def output_projection(layer: int) -> torch.nn.Module:
        return model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")

    def keep(layer: int):
        def hook(module: torch.nn.Module, arguments: Any) -> Any:
            outputs[layer] = arguments[0][rows, taken_from]

        return hook

    def replace(layer: int):
        def hook(module: torch.nn.Module, arguments: Any) -> Any:
            (z,) = arguments
            z = z.clone()
            width = z.shape[-1] // model.config.num_attention_heads
            for head in group.heads:
                if head.layer == layer:
                    part = slice(head.head * width, (head.head + 1) * width)
                    z[rows, to, part] = outputs[layer][:, part]
            return (z,)

        return hook

    with torch.no_grad():
        for make, tokens in ((keep, source.tokens), (replace, prompts.tokens)):
            handles = [
                output_projection(layer).register_forward_pre_hook(make(layer)) for layer in layers
            ]
            try:
                logits = model(tokens).logits
            finally:
                for handle in handles:
                    handle.remove()
    return logits[rows, prompts.positions["last"]].argmax(-1)


def _tokenize(prompts: Sequence[BoxPrompt], tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    return tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], tokenizer)


def _share(right: Bool[Tensor, " batch"]) -> float:
    return round(right.double().mean().item(), 6)
