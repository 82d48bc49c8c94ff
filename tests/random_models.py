"""Random models and prompts of every shape the engines claim to handle."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from tl_entity import PairBatch, PromptBatch

VOCABULARY = 20


def random_model(
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    d_head: int = 8,
    d_model: int = 24,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> HookedTransformer:
    """A Llama-like HookedTransformer whose weights are large enough for every path to matter."""
    n_kv_heads = n_kv_heads or n_heads
    settings: dict[str, Any] = {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_key_value_heads": None if n_kv_heads == n_heads else n_kv_heads,
        "d_head": d_head,
        "d_mlp": 40,
        "n_ctx": 32,
        "d_vocab": VOCABULARY,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_adjacent_pairs": False,
        "default_prepend_bos": False,
        "dtype": dtype,
        "device": "cpu",
    }
    model = HookedTransformer(HookedTransformerConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_norm = "ln" in name and parameter.ndim == 1
        parameter.data = (1 + 0.1 * noise if is_norm else 0.35 * noise).to(dtype)
    return model.requires_grad_(False)


def random_prompts(
    n_prompts: int, n_tokens: int, *, left: bool = False, seed: int = 0
) -> PromptBatch:
    """Prompts of unequal length; `place` is anywhere in each, `early` at its first token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, n_tokens + 1, (n_prompts,), generator=generator)
    lengths[0] = n_tokens
    start = n_tokens - lengths if left else torch.zeros_like(lengths)
    index = torch.arange(n_tokens)
    there = (index >= start[:, None]) & (index < (start + lengths)[:, None])
    inside = (torch.rand(n_prompts, generator=generator) * lengths).long()
    return PromptBatch(
        tokens=torch.randint(0, VOCABULARY, (n_prompts, n_tokens), generator=generator),
        answers=torch.randint(0, VOCABULARY, (n_prompts,), generator=generator),
        positions={"last": start + lengths - 1, "place": start + inside, "early": start},
        attention_mask=there.long(),
    )


def random_pairs(
    n_pairs: int = 4, n_tokens: int = 9, *, left: bool = False, seed: int = 0
) -> PairBatch:
    """Clean and corrupt prompts of different lengths, their positions apart."""
    clean = random_prompts(n_pairs, n_tokens, left=left, seed=2 * seed)
    corrupt = random_prompts(n_pairs, n_tokens - 2, left=left, seed=2 * seed + 1)
    return PairBatch(clean, corrupt, clean.answers)


def word_tokenizer(words: list[str], *, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word or mark; a word that is not listed becomes `<unk>`."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )
