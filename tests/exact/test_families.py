"""What models of some families do besides, in every method: heads' queries and keys normalised, as
in Qwen3; sliding windows, as in Mistral and Qwen2."""

from typing import Any

import pytest
import torch

from tests.all_methods import METHODS
from tests.random_models import random_model, random_pairs
from tl_entity import path_patch
from tl_entity.hooks.run import answer_logits

FAMILIES: dict[str, dict[str, Any]] = {
    "norms of queries and keys": {"use_qk_norm": True, "n_kv_heads": 2},
    "norms, every head its own": {"use_qk_norm": True},
    "windows in some layers": {
        "use_local_attn": True,
        "window_size": 3,
        "attn_types": ["local", "global", "local"],
        "n_kv_heads": 2,
    },
    "windows and norms": {
        "use_qk_norm": True,
        "use_local_attn": True,
        "window_size": 2,
        "attn_types": ["local", "local", "local"],
        "n_kv_heads": 1,
    },
}


PADDED_ON_THE_LEFT = (
    *("path_patch", "path_patch into v", "path_patch into q and k", "MaskedForward"),
    *("activation_patch", "cmap", "nodes alone", "gradient of gates", "mechanism_edges"),
)
"""Methods without an ablation by index, which takes no such prompts."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_engines_agree_in_float64(method: str, family: str) -> None:
    model, pairs = random_model(**FAMILIES[family]), random_pairs(5, seed=1)
    exact, hooks = (METHODS[method](model, pairs, engine) for engine in ("exact", "hooks"))
    torch.testing.assert_close(exact, hooks, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PADDED_ON_THE_LEFT)
def test_engines_agree_with_padding_on_the_left(method: str, family: str) -> None:
    model, pairs = random_model(**FAMILIES[family]), random_pairs(5, left=True, seed=1)
    exact, hooks = (METHODS[method](model, pairs, engine) for engine in ("exact", "hooks"))
    torch.testing.assert_close(exact, hooks, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_windows_matter_here(family: str) -> None:
    changes = dict(FAMILIES[family])
    model, pairs = random_model(**changes), random_pairs(5)
    before = answer_logits(model, pairs.clean)
    plain = random_model(n_kv_heads=changes.get("n_kv_heads"))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert (before - answer_logits(plain, pairs.clean)).abs().max() > 1e-3


def test_a_window_longer_than_the_prompts_changes_no_bit() -> None:
    windowed = {"use_local_attn": True, "window_size": 64, "attn_types": ["local"] * 3}
    pairs = random_pairs()
    plain, wide = (path_patch(random_model(**more), pairs) for more in ({}, windowed))
    assert torch.equal(plain.per_example, wide.per_example)
