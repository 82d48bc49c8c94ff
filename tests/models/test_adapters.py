"""Adapters give the numbers that peft gives, on weights that stay as they are."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.helpers import in_float64, llama, qwen2, qwen3, save
from tl_entity.errors import InputError
from tl_entity.models.load import load_model, with_adapter

TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"


def adapt(base: Path, folder: Path, *, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Save a random adapter of peft's for this base; the logits that peft gives, in float64."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **settings}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise) if "magnitude" not in name else parameter.mul_(
                    1 + 0.2 * noise.abs()
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    with torch.no_grad():
        return in_float64(wrapped.eval())(TOKENS).logits


def agrees(model: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        model(TOKENS).double().log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(llama(num_key_value_heads=2, head_dim=16), tmp_path / "base")


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all projections": {"target_modules": ALL},
    "a pattern": {"target_modules": r".*\.layers\.[01]\.mlp\.(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True, "target_modules": ALL},
    "rank-stabilised DoRA": {"use_dora": True, "use_rslora": True},
    "ranks by pattern": {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    },
    "one layer": {"layers_to_transform": [1]},
    "unembedding": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole modules": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(kind: str, base: Path, tmp_path: Path) -> None:
    expected = adapt(base, tmp_path / "adapter", **KINDS[kind])
    plain = load_model(base, device="cpu")
    merged = load_model(base, adapter=tmp_path / "adapter", device="cpu")
    assert (merged(TOKENS) - plain(TOKENS)).abs().max() > 0.1  # the adapter matters
    agrees(merged, expected)
    agrees(with_adapter(plain, tmp_path / "adapter"), expected)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_parts_tied_embeddings(target: str, whole: bool, tmp_path: Path) -> None:
    # peft changes what it is told to, and leaves the other of the two as it was.
    base = save(qwen2(tie_word_embeddings=True), tmp_path / "base")
    settings = {"modules_to_save": [target]} if whole else {"target_modules": ["q_proj", target]}
    expected = adapt(base, tmp_path / "adapter", **settings)
    merged = load_model(base, adapter=tmp_path / "adapter", device="cpu")
    agrees(merged, expected)
    assert not torch.equal(merged.W_E, merged.W_U.T)
    agrees(with_adapter(load_model(base, device="cpu"), tmp_path / "adapter"), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias: str, tmp_path: Path) -> None:
    base = save(qwen3(attention_bias=True), tmp_path / "base")
    expected = adapt(base, tmp_path / "adapter", bias=bias)
    agrees(load_model(base, adapter=tmp_path / "adapter", device="cpu"), expected)


def test_trained_biases_of_a_base_without_any(tmp_path: Path) -> None:
    adapt(save(llama(attention_bias=True), tmp_path / "biased"), tmp_path / "adapter", bias="all")
    plain = save(llama(), tmp_path / "plain")
    refused(plain, tmp_path / "adapter", "another base", ".bias")
    # A HookedTransformer has biases of zero there, which are not the checkpoint's.
    with pytest.raises(InputError, match=r"another base.*\.bias"):
        with_adapter(load_model(plain, device="cpu"), tmp_path / "adapter")


def test_dora_of_an_embedding(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "embed_tokens"])
    refused(base, tmp_path / "adapter", "DoRA on model.embed_tokens", "merge the adapter")


def test_pickled_adapter(base: Path, tmp_path: Path) -> None:
    expected = adapt(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    agrees(load_model(base, adapter=tmp_path / "adapter", device="cpu"), expected)


def test_merge_is_in_float32(tmp_path: Path) -> None:
    reference = llama().bfloat16()
    base = save(reference, tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    merged = load_model(base, adapter=tmp_path / "adapter", device="cpu")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    delta = 3.0 * tensors[name.format("B")] @ tensors[name.format("A")]
    expected = reference.model.layers[0].self_attn.q_proj.weight.float() + delta
    ours = merged.W_Q[0].transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_adapters_in_turn_share_the_base(base: Path, tmp_path: Path) -> None:
    files = {file: file.read_bytes() for file in base.iterdir()}
    first, second = (
        adapt(base, tmp_path / str(seed), seed=seed, r=2 + seed, lora_alpha=8) for seed in (0, 1)
    )
    plain = load_model(base, device="cpu")
    before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    one, two = with_adapter(plain, tmp_path / "0"), with_adapter(plain, tmp_path / "1")
    agrees(one, first)
    agrees(two, second)
    agrees(with_adapter(plain, tmp_path / "0"), first)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, before[name])
        changed = name.endswith((".W_Q", "._W_V"))
        for model in (one, two):
            shared = model.get_parameter(name).data_ptr() == parameter.data_ptr()
            assert shared != changed, name
    assert one.tokenizer is plain.tokenizer
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    assert files == {file: file.read_bytes() for file in base.iterdir()}


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapt(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(base: Path, adapter: Path | str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(base, adapter=adapter, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_no_adapter(base: Path, tmp_path: Path) -> None:
    refused(base, tmp_path / "nowhere", "nowhere", "no folder")
    refused(base, base, str(base), "no adapter_config.json")


def test_adapter_given_as_the_model(adapter: Path) -> None:
    with pytest.raises(InputError, match="adapter= with its base"):
        load_model(adapter, device="cpu")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "None"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "no rows of model.embed_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"something_new": 1}, "something_new"),
        ({"r": 0}, "r 0"),
        ({"r": 5}, "rank 4"),
        ({"lora_alpha": "x"}, "lora_alpha 'x'"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 3}}, "pattern '('"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
        ({"target_modules": "("}, "pattern '('"),
        ({"use_dora": True}, "magnitude"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
    ],
)
def test_configuration(base: Path, adapter: Path, changes: dict, word: str) -> None:
    change_config(adapter, **changes)
    refused(base, adapter, str(adapter), word)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_broken_configuration(base: Path, adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    refused(base, adapter, "adapter_config.json")


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda t: t.clear(), "no LoRA weights"),
        (lambda t: t.pop(A), "lacks lora_A for model.layers.1"),
        (lambda t: (t.pop(A), t.pop(B)), "no LoRA weights for model.layers.1.self_attn.q_proj"),
        (lambda t: t.update({B: torch.ones(64, 3)}), "do not fit each other"),
        (lambda t: t.update({B: torch.ones(64)}), "do not fit each other"),
        (lambda t: t.update({A: torch.ones(4, 30)}), "another base"),
        (lambda t: t.update({A: torch.ones(4, 32, dtype=torch.int8)}), "floating"),
        (lambda t: t.update({A.replace(".weight", ".other.weight"): t[A].clone()}), "twice"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)}), "score.weight"),
        (lambda t: t.update({A.replace(".weight", ".bias"): torch.ones(4)}), "bias"),
    ],
)
def test_weights(base: Path, adapter: Path, edit: Callable, word: str) -> None:
    change_weights(adapter, edit)
    refused(base, adapter, str(adapter), word)


def test_damaged_weights(base: Path, adapter: Path) -> None:
    file = adapter / WEIGHTS
    whole = file.read_bytes()
    for length in (len(whole) - 10, 30, 0):
        file.write_bytes(whole[:length])
        refused(base, adapter, str(file), "damaged")
    file.unlink()
    refused(base, adapter, str(adapter), "no adapter_model")


@pytest.mark.parametrize("other", [{"hidden_size": 48}, {"num_hidden_layers": 2}])
def test_wrong_base(adapter: Path, tmp_path: Path, other: dict) -> None:
    wrong = save(llama(num_key_value_heads=2, head_dim=16, **other), tmp_path / "wrong")
    refused(wrong, adapter, str(adapter), "another base")
    with pytest.raises(InputError, match="another base"):
        with_adapter(load_model(wrong, device="cpu"), adapter)


def test_adapter_for_fewer_layers_than_the_base_has(adapter: Path, tmp_path: Path) -> None:
    deeper = save(llama(num_key_value_heads=2, head_dim=16, num_hidden_layers=4), tmp_path / "deep")
    refused(deeper, adapter, str(adapter), "model.layers.3.self_attn.q_proj")


def test_code_in_an_adapter_does_not_run(base: Path, adapter: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (mark,))

    change_config(adapter, auto_mapping={"parent_library": "os", "base_model_class": "system"})
    (adapter / WEIGHTS).unlink()
    torch.save({A: Evil()}, adapter / "adapter_model.bin")
    refused(base, adapter, "adapter_model.bin", "only tensors", "getattr")
    assert not mark.exists()
