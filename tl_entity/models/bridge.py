"""A checkpoint as a TransformerBridge: Hugging Face's own modules with TransformerLens's hooks."""

import copy
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.models.adapter import Adapter, adapted_config
from tl_entity.models.checkpoint import UNEMBEDDING, Checkpoint
from tl_entity.models.files import reason
from tl_entity.models.tokenizers import prepends_bos
from tl_entity.models.weights import checked_tensors, converted, empty_weights


def bridge(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: torch.dtype,
    device: str,
) -> TransformerBridge:
    """The checkpoint as a TransformerBridge in compatibility mode, its weights unprocessed.

    It has HookedTransformer's hook names and Hugging Face's numbers. Weights are views of the
    checkpoint's, as for a HookedTransformer. A model in memory is not rewritten: the bridge works
    on another shell around the same weights.

    Raises:
        InputError: if the checkpoint is damaged or there is no tokenizer.
    """
    if tokenizer is None:
        raise InputError("A TransformerBridge needs a tokenizer: give one as tokenizer=.")
    model: Any = transformers_model(checkpoint, adapter, dtype, device)
    bos = prepends_bos(tokenizer)
    bridged = TransformerBridge.boot_transformers(
        checkpoint.place, hf_model=model, tokenizer=tokenizer, dtype=dtype, device=device
    )
    # Without processing: the weights are the checkpoint's, only the names are the old ones.
    bridged.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    bridged.tokenizer = tokenizer
    # Which made it the tokenizer's number of tokens.
    bridged.cfg.d_vocab = bridged.cfg.d_vocab_out = model.config.vocab_size
    bridged.cfg.tokenizer_prepends_bos = bridged.cfg.default_prepend_bos = bos
    bridged.requires_grad_(False)
    return bridged.eval()


def transformers_model(
    checkpoint: Checkpoint, adapter: Adapter | None, dtype: torch.dtype, device: str
) -> nn.Module:
    """The transformers model of the checkpoint's configuration around the checkpoint's weights."""
    config = copy.deepcopy(adapted_config(checkpoint.config, adapter))
    # What the bridge's hooks on scores and patterns need.
    config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    try:
        with empty_weights():
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # unknown activations and rotary embeddings raise different kinds
        raise InputError(
            f"transformers can't make the model that {checkpoint.place} describes: "
            f"{type(error).__name__}: {reason(error)}."
        ) from None
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shapes.setdefault(UNEMBEDDING, model.get_input_embeddings().weight.shape)
    untied = False
    for key, tensor in checked_tensors(checkpoint, shapes, adapter):
        module_name, _, name = key.rpartition(".")
        value = converted(f"{checkpoint.place}: {key}", tensor, dtype=dtype, device=device)
        parameter = nn.Parameter(value, requires_grad=False)
        model.get_submodule(module_name)._parameters[name] = parameter
        untied |= key == UNEMBEDDING
    if untied:
        model.config.tie_word_embeddings = False
    else:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model.to(device).eval()
