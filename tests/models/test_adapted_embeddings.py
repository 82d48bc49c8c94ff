"""Adapters that bring embeddings, or rows of them, give the numbers that peft gives with them."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.helpers import in_float64, llama, save
from tl_entity.errors import InputError
from tl_entity.models.load import load_model, with_adapter

N_TOKENS = 40
WEIGHTS = "adapter_model.safetensors"
EMBEDDING = "base_model.model.model.embed_tokens."
UNEMBEDDING = "base_model.model.lm_head."
BOTH = ["embed_tokens", "lm_head"]

KINDS: dict[str, dict[str, Any]] = {
    "projections": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "unembedding": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", *BOTH]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole unembedding": {"modules_to_save": ["lm_head"]},
    "whole both": {"modules_to_save": BOTH},
    "whole norms and an MLP": {"modules_to_save": ["input_layernorm", "norm", "layers.1.mlp"]},
    "LoRA in, whole out": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "tokens": {"trainable_token_indices": [3, 35, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "tokens that differ": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    "tokens of the unembedding": {"trainable_token_indices": {"lm_head": [4, 9]}},
}


def base_model(folder: Path, n_tokens: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if n_tokens != N_TOKENS:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    return model


def adapt(
    base: Path, folder: Path, *, n_tokens: int = N_TOKENS, save_embeddings: Any, **settings: Any
) -> Any:
    """Save a random adapter, and read it with peft again onto the base, in float64."""
    # A copy of the lists: peft changes them.
    settings = copy.deepcopy({"target_modules": ["q_proj"], "r": 4, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        wrapped = peft.get_peft_model(base_model(base, n_tokens), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.2 * noise)
        wrapped.save_pretrained(folder, save_embedding_layers=save_embeddings)
        again = peft.PeftModel.from_pretrained(base_model(base, n_tokens), folder)
    return in_float64(again.eval())


def load(base: Path, **keywords: Any) -> Any:
    return load_model(base, device="cpu", dtype="float64", **keywords)


def agrees(model: Any, reference: Any, n_tokens: int = N_TOKENS) -> None:
    assert model.cfg.d_vocab == n_tokens
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, n_tokens, (2, 30), generator=generator)
    with torch.no_grad():
        expected = reference(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(model(tokens).double().log_softmax(-1), expected, atol=1e-4, rtol=0)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: Any, tmp_path: Path) -> Path:
    return save(llama(num_key_value_heads=2, tie_word_embeddings=request.param), tmp_path / "base")


@pytest.mark.parametrize(("save_embeddings", "ties"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(
    kind: str, save_embeddings: bool, ties: bool, base: Path, tmp_path: Path
) -> None:
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    if kind == "tokens that differ" and ties and tied:
        pytest.skip("peft refuses to tie rows of different tokens")
    adapter, settings = tmp_path / "adapter", {**KINDS[kind], "ensure_weight_tying": ties}
    reference = adapt(base, adapter, save_embeddings=save_embeddings, **settings)
    plain = load(base)
    before = copy.deepcopy(plain.state_dict())
    agrees(load(base, adapter=adapter), reference)
    agrees(with_adapter(plain, adapter), reference)
    if save_embeddings and not ties:
        agrees(load(base, adapter=adapter, backend="bridge"), reference)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("n_tokens", [N_TOKENS + 3, N_TOKENS - 4])
@pytest.mark.parametrize("kind", ["projections", "both", "whole embedding", "whole both", "tokens"])
def test_resized_vocabulary(kind: str, n_tokens: int, base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    reference = adapt(base, adapter, n_tokens=n_tokens, save_embeddings=True, **KINDS[kind])
    plain = load(base)
    for model in (
        load(base, adapter=adapter),
        with_adapter(plain, adapter),
        load(base, adapter=adapter, backend="bridge"),
    ):
        agrees(model, reference, n_tokens)
    assert plain.cfg.d_vocab == plain.W_U.shape[1] == N_TOKENS


def test_tied_embeddings_stay_one_where_they_can(tmp_path: Path) -> None:
    base = save(llama(tie_word_embeddings=True), tmp_path / "base")
    for kind, tied in (("tokens", True), ("projections", True), ("embedding", False)):
        adapt(base, tmp_path / kind, save_embeddings=True, **KINDS[kind])
        for model in (
            load_model(base, adapter=tmp_path / kind, device="cpu"),
            with_adapter(load_model(base, device="cpu"), tmp_path / kind),
        ):
            assert (model.W_U.data_ptr() == model.W_E.data_ptr()) == tied
            assert model.cfg.tie_word_embeddings == tied


@pytest.mark.parametrize("kind", ["embedding", "whole embedding", "whole unembedding"])
def test_new_rows_that_the_adapter_lacks(kind: str, base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path / "adapter", n_tokens=N_TOKENS + 3, save_embeddings=False, **KINDS[kind])
    with pytest.raises(InputError, match=r"vocabulary of 43 tokens and lacks the new rows of"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


def test_rows_from_the_end_go_with_a_smaller_vocabulary(base: Path, tmp_path: Path) -> None:
    """What it does not hold is what the base has, less the tokens that are no more."""
    adapter = tmp_path / "adapter"
    settings = KINDS["whole embedding"]
    reference = adapt(base, adapter, n_tokens=N_TOKENS - 4, save_embeddings=False, **settings)
    agrees(load(base, adapter=adapter), reference, N_TOKENS - 4)


def change_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        (
            "whole both",
            lambda t: t.update({f"{UNEMBEDDING}weight": torch.ones(43, 32)}),
            "vocabularies of different sizes",
        ),
        (
            "whole both",
            lambda t: t.update({f"{UNEMBEDDING}weight": torch.ones(40, 30)}),
            "another base: its lm_head.weight",
        ),
        ("whole both", lambda t: t.pop(f"{UNEMBEDDING}weight"), "has no lm_head.weight"),
        (
            "whole both",
            lambda t: t.update(
                {f"{UNEMBEDDING}modules_to_save.{name}.weight": torch.ones(40, 32) for name in "ab"}
            ),
            "twice, for two adapters",
        ),
        (
            "tokens",
            lambda t: t.update(
                {f"{EMBEDDING}token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
            ),
            "trainable_token_indices names 3 tokens",
        ),
        (
            "tokens",
            lambda t: t.pop(f"{EMBEDDING}token_adapter.trainable_tokens_delta"),
            "no rows of model.embed_tokens",
        ),
    ],
)
def test_what_is_wrong_is_named(kind: str, edit: Callable, words: str, tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(base, tmp_path / "adapter", save_embeddings=False, **KINDS[kind])
    change_weights(tmp_path / "adapter", edit)
    with pytest.raises(InputError, match=words):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable_token_indices": [3, 35, 40]}, "row of model.embed_tokens.weight for token 40"),
        ({"trainable_token_indices": ["a", 1, 2]}, "lists of tokens"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "lists of tokens"),
        ({"modules_to_save": "lm_head"}, "modules_to_save 'lm_head'"),
    ],
)
def test_configuration(changes: dict, words: str, tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapt(base, tmp_path / "adapter", save_embeddings=False, **KINDS["tokens"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InputError, match=words):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")
