"""Whether two models are built alike, so that one can take activations of the other."""

from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError

SHARED_SETTINGS = (
    "n_layers",
    "d_model",
    "n_heads",
    "n_key_value_heads",
    "d_head",
    "d_mlp",
    "act_fn",
    "gated_mlp",
    "normalization_type",
    "positional_embedding_type",
    "rotary_dim",
    "rotary_base",
    "rotary_adjacent_pairs",
)
"""What two models must have in common for the activations of one to mean the same in the other.
Rotary tables are compared too, since scaled ones follow from many settings."""


ROTARY_TOKENS = 512
"""How far the rotary embeddings of two bridges, which keep no table, are compared."""


@checked
def check_same_architecture(one: Model, other: Model) -> None:
    """Make sure that activations of one model have their place in the other.

    Sizes, kinds of layers and rotary embedding must be the same, and the tokenizers, where both
    models have one, must write every token that both know as the same number. What only one of
    them has, such as a padding token that fine-tuning added, does no harm.

    Raises:
        InputError: naming the first thing that differs.
    """
    if one is other:
        return
    for setting in SHARED_SETTINGS:
        ours, theirs = getattr(one.cfg, setting), getattr(other.cfg, setting)
        # With the norms' weights folded into what reads them ("RMSPre"), activations are the same.
        if str(ours).removesuffix("Pre") != str(theirs).removesuffix("Pre"):
            raise InputError(
                f"The models differ in {setting} ({ours} and {theirs}); "
                "activations can only be patched between models of one architecture."
            )
    for layer in range(one.cfg.n_layers):
        if not _same_rotary(one, other, layer):
            raise InputError(
                f"The models differ in the rotary embedding of layer {layer}; "
                "activations can only be patched between models of one architecture."
            )
    if one.tokenizer is None or other.tokenizer is None:
        if one.cfg.d_vocab != other.cfg.d_vocab:
            raise InputError(
                f"The models differ in d_vocab ({one.cfg.d_vocab} and {other.cfg.d_vocab}) and, "
                "without both tokenizers, can't be known to share one."
            )
        return
    ours_of: Any = one.tokenizer
    theirs_of: Any = other.tokenizer
    our_ids, their_ids = ours_of.get_vocab(), theirs_of.get_vocab()
    shared = our_ids.keys() & their_ids.keys()
    differing = sorted((our_ids[t], t) for t in shared if our_ids[t] != their_ids[t])
    if differing:
        _, token = differing[0]
        raise InputError(
            f"The models differ in their tokenizers: {token!r} is {our_ids[token]} in one and "
            f"{their_ids[token]} in the other ({len(differing)} such tokens)."
        )
    added = ours_of.get_added_vocab().keys() | theirs_of.get_added_vocab().keys()
    alone = sorted((our_ids.keys() ^ their_ids.keys()) - added)
    if alone:
        where = "first" if alone[0] in our_ids else "second"
        raise InputError(
            f"The models differ in their tokenizers: only the {where} knows {alone[0]!r} "
            f"({len(alone)} such tokens)."
        )


def _same_rotary(one: Model, other: Model, layer: int) -> bool:
    ours, theirs = _rotary_tables(one, layer), _rotary_tables(other, layer)
    # TransformerLens lengthens the tables as prompts need it.
    return all(
        torch.allclose(a[:length].float(), b[:length].float().to(a.device), atol=1e-2)
        for a, b in zip(ours, theirs, strict=True)
        for length in (min(len(a), len(b)),)
    )


def _rotary_tables(model: Model, layer: int) -> list[Tensor]:
    """Cosines and sines by token; none for a model without."""
    attn = model.blocks[layer].attn
    if isinstance(model, HookedTransformer):
        return [attn.rotary_cos, attn.rotary_sin] if hasattr(attn, "rotary_cos") else []
    # One for all layers, as in Hugging Face's models.
    rotary = getattr(model, "rotary_emb", None)
    if rotary is None:
        return []
    tokens = torch.arange(ROTARY_TOKENS, device=model.cfg.device)
    cos, sin = rotary(torch.zeros(1, device=model.cfg.device), tokens[None])
    return [cos[0], sin[0]]
