"""Models with folded norms: the same numbers, and TransformerLens's own tools are right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.helpers import llama, mistral, qwen2, qwen3, save
from tests.models.test_adapters import adapt
from tl_entity import Head, PairBatch, PromptBatch, cmap, evaluate, learn_mask, path_patch
from tl_entity.errors import InputError
from tl_entity.models.load import load_model, with_adapter

TOKENS = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(1))

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(num_key_value_heads=2, attention_bias=True),
    "tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: qwen2(num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: qwen3(num_key_value_heads=2),
    "mistral": lambda: mistral(sliding_window=4),
}


def load(source: Any, **keywords: Any) -> Any:
    return load_model(source, **{"device": "cpu", "dtype": "float64", **keywords})


@pytest.fixture(params=FAMILIES)
def folder(request: Any, tmp_path: Path) -> Path:
    return save(FAMILIES[request.param](), tmp_path / "base")


def test_activations_are_the_same(folder: Path) -> None:
    plain, folded = load(folder), load(folder, fold_norms=True)
    logits, cache = plain.run_with_cache(TOKENS)
    folded_logits, folded_cache = folded.run_with_cache(TOKENS)
    torch.testing.assert_close(folded_logits, logits, atol=1e-11, rtol=0)
    assert set(folded_cache) == set(cache)
    for name in set(cache) - {"unembed.hook_in"}:  # the final norm's output, weights and all
        torch.testing.assert_close(folded_cache[name], cache[name], atol=1e-11, rtol=0)
    assert not any(".ln1." in name or ".ln2." in name for name, _ in folded.named_parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def attribution_error(model: Any) -> float:
    """How far the components' direct logit attributions are, summed, from the logit difference."""
    logits, cache = model.run_with_cache(TOKENS)
    right, wrong = torch.arange(4) + 5, torch.arange(4) + 20
    stack = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=False)
    found = cache.logit_attrs(stack[:, :, -1], right, wrong, pos_slice=-1).sum(0)
    rows = torch.arange(4)
    return (found - (logits[rows, -1, right] - logits[rows, -1, wrong])).abs().max().item()


def test_direct_logit_attribution_sums_to_the_logit_difference(folder: Path) -> None:
    assert attribution_error(load(folder, fold_norms=True)) < 1e-6
    # What the note in load_model's docstring says of a model that is not folded.
    assert attribution_error(load(folder)) > 1e-2


def test_numbers_of_a_bfloat16_checkpoint_are_products_without_rounding(tmp_path: Path) -> None:
    reference = llama().bfloat16()
    folded = load_model(
        save(reference, tmp_path / "base"), device="cpu", dtype="float32", fold_norms=True
    )
    norm, head = reference.model.norm.weight.double(), reference.lm_head.weight.double()
    assert torch.equal(folded.W_U.T.double(), head * norm)


def test_tied_embeddings_are_two(tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(save(FAMILIES["tied"](), tmp_path / "base"))
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    folded = load_model(reference, device="cpu", fold_norms=True)
    weight = reference.get_input_embeddings().weight
    assert folded.W_E.data_ptr() == weight.data_ptr()
    assert torch.equal(folded.W_U.T, weight * reference.model.norm.weight)
    assert not folded.cfg.tie_word_embeddings
    # The model in memory shares what is not folded, and stays as it is.
    assert folded.blocks[0].attn.W_O.data_ptr() == (
        reference.model.layers[0].self_attn.o_proj.weight.data_ptr()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())


def test_with_an_adapter(tmp_path: Path) -> None:
    base = save(FAMILIES["tied"](), tmp_path / "base")
    targets = {"target_modules": ["q_proj", "up_proj", "lm_head"], "modules_to_save": ["norm"]}
    expected = adapt(base, tmp_path / "adapter", use_dora=True, **targets)
    folded = load(base, adapter=tmp_path / "adapter", fold_norms=True)
    tokens = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        folded(tokens).log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0
    )
    assert attribution_error(folded) < 1e-6
    with pytest.raises(InputError, match="give the adapter to load_model, together with fold"):
        with_adapter(load(base, fold_norms=True), tmp_path / "adapter")


def prompts(seed: int) -> PromptBatch:
    generator = torch.Generator().manual_seed(seed)
    return PromptBatch(
        tokens=torch.randint(0, 40, (4, 9), generator=generator),
        answers=torch.arange(4) + 5,
        positions={"last": torch.full((4,), 8), "middle": torch.tensor([3, 4, 5, 3])},
    )


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_methods_give_the_same_numbers(engine: Any, tmp_path: Path) -> None:
    plain, folded = (
        load(save(FAMILIES["llama"](), tmp_path / "base"), fold_norms=fold)
        for fold in (False, True)
    )
    clean = prompts(0)
    pairs = PairBatch(clean=clean, corrupt=prompts(1), targets=clean.answers)
    heads = {"middle": [Head(1, 1), Head(2, 3)]}
    tuned = load(save(tuned_llama(), tmp_path / "tuned"))

    def numbers(model: Any) -> list[torch.Tensor]:
        scores = [path_patch(model, pairs, engine=engine).per_example]
        for which in ("q", "k", "v"):
            patched = path_patch(
                model,
                pairs,
                position="middle",
                receivers=heads["middle"],
                receiver_input=which,
                engine=engine,
            )
            scores.append(patched.per_example)
        scores.append(evaluate(model, clean, engine=engine).answer_log_probability)
        for patch in ("output", "qk"):
            # A folded and an unfolded model have the same activations, so they can be patched.
            found = cmap(model, tuned, clean, heads, patch=patch, engine=engine)
            scores.append(found.answer_log_probability)
        mask = learn_mask(model, pairs, heads["middle"], position="middle", engine=engine)
        return [*scores, mask.trajectory]

    for ours, expected in zip(numbers(folded), numbers(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def tuned_llama() -> Any:
    """The Llama of `FAMILIES` with other numbers."""
    model = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_that_would_be_rounded(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"In {dtype} .* would be rounded"):
        load(save(llama(), tmp_path / "base"), dtype=dtype, fold_norms=True)


def test_a_bridge_is_not_folded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Hugging Face's own modules.*backend=\"hooked\""):
        load(save(llama(), tmp_path / "base"), backend="bridge", fold_norms=True)
