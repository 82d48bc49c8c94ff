"""Every method on a TransformerBridge gives what it gives on a HookedTransformer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_entity import (
    Circuit,
    Group,
    Head,
    InputError,
    activation_patch,
    cmap,
    completeness,
    desideratum_pairs,
    discover_circuit,
    discovery_pairs,
    evaluate,
    knock_out_attention,
    learn_mask,
    load_model,
    mean_head_outputs,
    minimality,
    path_patch,
    path_patch_mlps,
    summarize_attention,
)
from tl_entity.hooks import hook_point, record, separate_kv_heads
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.study.settings import GROUPS

LAST = [Head(2, 0), Head(3, 1)]
LABEL = [Head(1, 2)]
CIRCUIT = Circuit(
    (Group("fetcher", "last", tuple(LAST)), Group("detector", "query_label", tuple(LABEL)))
)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        f"{name} {backend}": load_model(f"default-{name}", backend=backend, device="cpu")
        for name in ("base", "tuned")
        for backend in ("hooked", "bridge")
    }


@pytest.fixture(scope="module")
def pairs(models):
    return discovery_pairs(models["base hooked"].tokenizer, 4, n_boxes=3, seed=0)


@pytest.fixture(scope="module")
def means(models, pairs) -> Tensor:
    return mean_head_outputs(models["base hooked"], pairs.corrupt)


def scores(model: Any, pairs: Any, **how: Any) -> Tensor:
    return path_patch(model, pairs, engine="hooks", **how).per_example


METHODS: dict[str, Callable[..., Tensor]] = {
    "logits": lambda m, t, p, a: scores(m, p),
    "q receivers": lambda m, t, p, a: scores(
        m, p, position="last", receivers=[Head(3, 1), Head(3, 5)], receiver_input="q"
    ),
    **{
        f"{which} receivers": lambda m, t, p, a, which=which: scores(
            m, p, position="query_label", receivers=[Head(2, 5), Head(3, 2)], receiver_input=which
        )
        for which in ("k", "v")
    },
    "discovery": lambda m, t, p, a: torch.cat(
        [
            stage.per_example.flatten()
            for stage in discover_circuit(
                m,
                p,
                sizes=dict.fromkeys(GROUPS, 3),
                receiver_sizes=dict.fromkeys(GROUPS[:-1], 2),
                engine="hooks",
            ).scores.values()
        ]
    ),
    "MLPs": lambda m, t, p, a: path_patch_mlps(m, p, engine="hooks").per_example,
    "mean outputs": lambda m, t, p, a: mean_head_outputs(m, p.corrupt),
    "model": lambda m, t, p, a: evaluate(m, p.clean, engine="hooks").answer_log_probability,
    "circuit": lambda m, t, p, a: (
        evaluate(m, p.clean, keep=CIRCUIT, mean_outputs=a, engine="hooks").answer_log_probability
    ),
    "attention": lambda m, t, p, a: (
        summarize_attention(m, p.clean, LAST, from_position="last").weights
    ),
    "knockout": lambda m, t, p, a: knock_out_attention(
        m, p.clean, from_position="last", to_position="correct_object", engine="hooks"
    ),
    "DCM": lambda m, t, p, a: (
        learn_mask(
            m,
            desideratum_pairs(m.tokenizer, "position", 8, n_boxes=3, seed=1),
            LAST,
            position="last",
            batch_size=4,
            engine="hooks",
        ).trajectory
    ),
    "activation patching": lambda m, t, p, a: (
        activation_patch(
            m,
            desideratum_pairs(m.tokenizer, "position", 8, n_boxes=3, seed=1),
            CIRCUIT,
            engine="hooks",
        ).answer_log_probability
    ),
    **{
        f"CMAP of {patch}": lambda m, t, p, a, patch=patch: (
            cmap(m, t, p.clean, CIRCUIT, patch=patch, engine="hooks").answer_log_probability
        )
        for patch in ("output", "q", "k", "v", "qkv")
    },
    "completeness": lambda m, t, p, a: torch.tensor(
        completeness(m, p.clean, CIRCUIT, mean_outputs=a, seed=0, engine="hooks")
        .to_dataframe()
        .select_dtypes("number")
        .to_numpy()
    ),
    "minimality": lambda m, t, p, a: torch.tensor(
        minimality(m, p.clean, CIRCUIT, mean_outputs=a, seed=0, engine="hooks")
        .to_dataframe()
        .select_dtypes("number")
        .to_numpy()
    ),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_bridge_gives_the_same_numbers(models, pairs, means, method):
    hooked, bridged = (
        METHODS[method](models[f"base {backend}"], models[f"tuned {backend}"], pairs, means)
        for backend in ("hooked", "bridge")
    )
    assert torch.isfinite(hooked).any()
    torch.testing.assert_close(bridged, hooked, atol=1e-4, rtol=1e-3, equal_nan=True)


def test_the_exact_engine_refuses_it(models, pairs):
    with pytest.raises(InputError, match="this is a TransformerBridge"):
        path_patch(models["base bridge"], pairs)


def test_set_apart_keys_and_values_are_shared_again(models, pairs):
    """The pair shares a key-value head between two query heads."""
    model = models["base bridge"]
    point = {hook_point("v", 1): None}
    before = record(model, pairs.clean, point)
    with separate_kv_heads(model):
        apart = record(model, pairs.clean, point)
    after = record(model, pairs.clean, point)
    name = hook_point("v", 1)
    assert before[name].shape[2] == 4
    assert torch.equal(apart[name], before[name].repeat_interleave(2, 2))
    assert torch.equal(after[name], before[name])


def test_bridges_with_other_rotary_embeddings_are_told_apart(models):
    other = load_model("default-tuned", backend="bridge", device="cpu")
    check_same_architecture(models["base bridge"], other)
    other.rotary_emb.original_component.inv_freq *= 0.9
    with pytest.raises(InputError, match="rotary embedding of layer 0"):
        check_same_architecture(models["base bridge"], other)
