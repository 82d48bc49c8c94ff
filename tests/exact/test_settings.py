"""Models that are set up otherwise than a plain Llama: the same scores, or a refusal."""

from typing import Any

import pytest
import torch

from tests.random_models import random_model, random_pairs
from tl_entity import Head, InputError, path_patch

RECEIVERS = [Head(1, 1), Head(2, 2), Head(2, 0)]


def largest_difference(changes: dict[str, Any], receiver_input: str | None) -> float:
    model = random_model(**changes).eval()
    how = {
        "position": "last",
        "receivers": None if receiver_input is None else RECEIVERS,
        "receiver_input": receiver_input,
    }
    pairs = random_pairs()
    exact, hooks = (path_patch(model, pairs, **how, engine=e) for e in ("exact", "hooks"))
    assert hooks.per_example.abs().max() > 1e-2
    difference = (exact.per_example - hooks.per_example).abs() / (1 + hooks.per_example.abs())
    return difference.max().item()


@pytest.mark.parametrize("receiver_input", [None, "q", "k", "v"])
@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_dim": 4},
        {"rotary_adjacent_pairs": True},
        {"use_attn_scale": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"normalization_type": "RMSPre"},
        {"post_embedding_ln": True},
        {"num_experts": 3, "experts_per_token": 2},
        {"use_split_qkv_input": True, "n_kv_heads": 2},
        {"use_attn_result": True, "use_hook_mlp_in": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_settings_are_recomputed_exactly(
    changes: dict[str, Any], receiver_input: str | None
) -> None:
    assert largest_difference(changes, receiver_input) < 1e-9


@pytest.mark.parametrize("receiver_input", ["q", "k", "v"])
@pytest.mark.parametrize(
    "changes",
    [
        {"ungroup_grouped_query_attention": True, "n_kv_heads": 2},
        {"use_logn_attn": True, "train_seq_length": 3},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_attention_that_is_computed_otherwise_is_exact_or_refused(
    changes: dict[str, Any], receiver_input: str | None
) -> None:
    try:
        difference = largest_difference(changes, receiver_input)
    except InputError as refusal:
        assert 'engine="hooks"' in str(refusal)
    else:
        assert difference < 1e-9


@pytest.mark.parametrize("receiver_input", [None, "q", "k", "v"])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)], ids=str
)
def test_half_precision_is_as_near_the_truth_as_its_digits_allow(
    dtype: torch.dtype, tolerance: float, n_kv_heads: int, receiver_input: str | None
) -> None:
    """Each engine in half precision against the same rounded weights run in float64."""
    half = random_model(n_kv_heads=n_kv_heads, dtype=dtype)
    full = random_model(n_kv_heads=n_kv_heads)
    for name, parameter in full.named_parameters():
        parameter.data = half.get_parameter(name).double()
    pairs = random_pairs()
    receivers = None if receiver_input is None else RECEIVERS
    how = {"receivers": receivers, "receiver_input": receiver_input}
    truth = path_patch(full, pairs, **how).per_example
    for engine in ("exact", "hooks"):
        found = path_patch(half, pairs, **how, engine=engine).per_example
        assert found.dtype == torch.float32
        assert ((found - truth).abs() / (1 + truth.abs())).max() < tolerance, engine
