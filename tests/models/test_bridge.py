"""A bridge has Hugging Face's numbers, HookedTransformer's hooks, and shares the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.gguf_helpers import write_gguf
from tests.models.helpers import llama, mistral, qwen2, qwen3, save
from tests.models.test_adapters import adapt
from tl_entity.errors import InputError
from tl_entity.models.load import load_model

TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))


def bridged(source: Any, **keywords: Any) -> Any:
    return load_model(source, backend="bridge", device="cpu", **keywords)


def agrees(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        ours.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(num_key_value_heads=2, head_dim=16),
        lambda: llama(tie_word_embeddings=True),
        lambda: qwen2(num_key_value_heads=2),
        qwen3,
        lambda: mistral(sliding_window=8),
    ],
)
def test_logits_and_heads_are_those_of_both(make: Callable, tmp_path: Path) -> None:
    reference = make()
    folder = save(reference, tmp_path)
    ours, hooked = bridged(folder), load_model(folder, device="cpu")
    with torch.no_grad():
        agrees(ours(TOKENS), reference(TOKENS).logits)
        names = [f"blocks.{layer}.attn.hook_{what}" for layer in range(3) for what in "zqkv"]
        _, theirs = ours.run_with_cache(TOKENS, names_filter=names)
        _, cache = hooked.run_with_cache(TOKENS, names_filter=names)
    for name in names:
        if not name.endswith("hook_z") and make is qwen3:
            continue  # before the norms of queries and keys in one, after them in the other
        torch.testing.assert_close(theirs[name], cache[name], atol=1e-4, rtol=1e-4)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(num_key_value_heads=2, mlp_bias=True),
        lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        lambda: llama(hidden_act="relu2"),
        lambda: mistral(hidden_act="tanh"),
        # Longer prompts than the model was made for, whose angles are others.
        lambda: llama(rope_parameters=DYNAMIC, max_position_embeddings=16),
    ],
)
def test_what_only_huggingface_has(make: Callable, tmp_path: Path) -> None:
    reference = make()
    folder = save(reference, tmp_path)
    with pytest.raises(InputError, match=r"HookedTransformer can't represent .*backend=\"bridge\""):
        load_model(folder, device="cpu")
    ours = bridged(folder)
    with torch.no_grad():
        agrees(ours(TOKENS), reference(TOKENS).logits)


def test_a_setting_that_a_family_passes_over_is_no_obstacle(tmp_path: Path) -> None:
    reference = qwen2(mlp_bias=True)  # Qwen2's MLPs have no biases, whatever the configuration says
    folder = save(reference, tmp_path)
    with torch.no_grad():
        for ours in (bridged(folder), load_model(folder, device="cpu")):
            agrees(ours(TOKENS), reference(TOKENS).logits)


def test_what_transformers_does_not_know(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"silu"', '"nosuch"'))
    with pytest.raises(InputError, match=r"transformers can't make the model .*'nosuch'"):
        bridged(folder)


def test_it_counts_the_tokens_of_the_model(tmp_path: Path) -> None:
    """Which may be more than the tokenizer knows."""
    ours = bridged(save(llama(vocab_size=64), tmp_path))
    assert ours.cfg.d_vocab == ours.cfg.d_vocab_out == ours.W_E.shape[0] == 64


def test_it_has_the_adapter_and_the_tokenizer(tmp_path: Path) -> None:
    base = save(llama(tie_word_embeddings=True), tmp_path / "base", prepends_bos=True)
    expected = adapt(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    ours = bridged(base, adapter=tmp_path / "adapter")
    agrees(ours(TOKENS), expected)
    assert ours.to_tokens("w5 w7").tolist() == [[0, 5, 7]]
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_from_gguf(tmp_path: Path) -> None:
    reference = write_gguf(llama(), tmp_path / "m.gguf")
    agrees(bridged(tmp_path / "m.gguf")(TOKENS), reference(TOKENS).logits)


def test_model_in_memory_is_not_rewritten(tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(save(llama(), tmp_path))
    before = [name for name, _ in reference.named_modules()]
    expected = reference(TOKENS).logits
    ours = bridged(reference)
    agrees(ours(TOKENS), expected)
    assert [name for name, _ in reference.named_modules()] == before
    assert torch.equal(reference(TOKENS).logits, expected)
    with pytest.raises(InputError, match="tokenizer="):
        bridged(llama())
