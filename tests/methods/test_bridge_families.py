"""Bridges of models whose query heads share keys and values: every family, with k and v receivers,
patched keys and values, and the residual stream recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.helpers import llama, mistral, qwen2, qwen3, save
from tl_entity import Circuit, Head, PairBatch, PromptBatch, cmap, discover_circuit, path_patch
from tl_entity.heads import ENTITY_TRACKING_POSITIONS
from tl_entity.hooks import hook_point, must_fire, patch_heads, record
from tl_entity.hooks.run import answer_logits
from tl_entity.models.load import load_model
from tl_entity.study.settings import GROUPS

SHARED: dict[str, Any] = {"num_key_value_heads": 2, "num_hidden_layers": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(**SHARED, attention_bias=True),
    "one key-value head": lambda: llama(**{**SHARED, "num_key_value_heads": 1}),
    "qwen2": lambda: qwen2(**SHARED),
    "qwen3": lambda: qwen3(**SHARED),
    "mistral": lambda: mistral(**SHARED, sliding_window=4),
}
RECEIVERS = [Head(1, 1), Head(3, 0), Head(3, 3)]


def changed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: Any, tmp_path_factory: Any) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("models")
    save(FAMILIES[request.param](), folder / "base")
    save(changed(FAMILIES[request.param]()), folder / "tuned")
    return {
        f"{name} {backend}": load_model(
            folder / name, backend=backend, device="cpu", dtype="float64"
        )
        for name in ("base", "tuned")
        for backend in ("hooked", "bridge")
    }


def prompts(seed: int) -> PromptBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (3, 9), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 7:] = False
    last = mask.sum(1) - 1
    return PromptBatch(
        tokens=tokens,
        answers=torch.arange(3) + 5,
        positions={
            "last": last,
            "query_label": last - 2,
            "previous_query_label": torch.tensor([2, 1, 3]),
        },
        attention_mask=mask,
    )


CLEAN = prompts(0)
PAIRS = PairBatch(clean=CLEAN, corrupt=prompts(1), targets=CLEAN.answers)


def same(bridged: torch.Tensor, hooked: torch.Tensor) -> None:
    # Hugging Face's norms and softmax are in float32 whatever the weights are in.
    torch.testing.assert_close(bridged, hooked, atol=2e-5, rtol=0)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_receivers(models: dict[str, Any], which: Any) -> None:
    hooked, bridged = (
        path_patch(
            models[f"base {backend}"],
            PAIRS,
            position="query_label",
            receivers=RECEIVERS,
            receiver_input=which,
            engine="hooks",
        ).per_example
        for backend in ("hooked", "bridge")
    )
    assert hooked.abs().max() > 1e-3
    same(bridged, hooked)


@pytest.mark.parametrize("patch", ["output", "q", "k", "v", "qk", "qkv"])
def test_patched_from_another_model(models: dict[str, Any], patch: str) -> None:
    heads = {"query_label": [Head(1, 1), Head(2, 3)], "last": [Head(3, 0)]}
    hooked, bridged, alone = (
        cmap(
            models[f"base {backend}"],
            models[f"tuned {backend}"],
            CLEAN,
            some,
            patch=patch,
            engine="hooks",
        ).answer_log_probability
        for backend, some in (("hooked", heads), ("bridge", heads), ("hooked", {}))
    )
    assert (hooked - alone).abs().max() > 1e-3
    same(bridged, hooked)


def test_all_inputs_together_make_the_output(models: dict[str, Any]) -> None:
    """What a head puts out follows from its queries, keys and values, also where the first two are
    normalised, by weights that the two models do not share."""
    heads = {"query_label": [Head(1, 1), Head(2, 3)]}
    inputs, output = (
        cmap(
            models["base hooked"], models["tuned hooked"], CLEAN, heads, patch=patch, engine="hooks"
        ).answer_log_probability
        for patch in ("qkv", "output")
    )
    torch.testing.assert_close(inputs, output, atol=1e-9, rtol=0)


def test_keys_by_hand(models: dict[str, Any]) -> None:
    """One head attends with another model's keys: softmax and mean written out."""
    base, tuned, head = models["base hooked"], models["tuned hooked"], Head(2, 3)
    at = CLEAN.position("query_label")
    points = {which: hook_point(which, 2) for which in ("rot_q", "rot_k", "v", "z")}
    own = record(base, CLEAN, dict.fromkeys(points.values()))
    theirs = record(tuned, CLEAN, dict.fromkeys(points.values()))
    shared = head.head // (base.cfg.n_heads // (base.cfg.n_key_value_heads or base.cfg.n_heads))
    window = base.cfg.window_size if base.cfg.use_local_attn else 10**6
    z = own[points["z"]].clone()
    for row, token in enumerate(at.tolist()):
        seen = slice(max(0, token - window + 1), token + 1)
        query = own[points["rot_q"]][row, token, head.head]
        keys = theirs[points["rot_k"]][row, seen, shared]
        weights = (keys @ query / base.cfg.d_head**0.5).softmax(0)
        z[row, token, head.head] = weights @ own[points["v"]][row, seen, shared]
    hooks = patch_heads({points["z"]: z}, {"query_label": [head]}, into=CLEAN)
    expected = answer_logits(base, CLEAN, hooks).log_softmax(-1)
    found = cmap(base, tuned, CLEAN, {"query_label": [head]}, patch="k", engine="hooks")
    rows = torch.arange(len(CLEAN))
    torch.testing.assert_close(
        found.answer_log_probability, expected[rows, CLEAN.answers], atol=1e-9, rtol=0
    )


def test_discovery_in_four_stages(models: dict[str, Any]) -> None:
    found = {
        backend: discover_circuit(
            models[f"base {backend}"],
            PAIRS,
            sizes=dict.fromkeys(GROUPS, 3),
            receiver_sizes=dict.fromkeys(GROUPS[:-1], 2),
            engine="hooks",
        )
        for backend in ("hooked", "bridge")
    }
    assert set(found["bridge"].scores) == set(ENTITY_TRACKING_POSITIONS)
    for group, scores in found["hooked"].scores.items():
        same(found["bridge"].scores[group].per_example, scores.per_example)
    circuits: list[Circuit] = [discovery.circuit for discovery in found.values()]
    assert circuits[0] == circuits[1]


def test_every_named_point_is_recorded(models: dict[str, Any]) -> None:
    points = [
        hook_point(name, layer)
        for name in (
            *("q", "k", "v", "rot_q", "rot_k", "z", "attn_out", "mlp_out"),
            *("resid_pre", "resid_mid", "resid_post"),
        )
        for layer in (0, 2)
    ]
    for wanted in (dict.fromkeys(points), dict.fromkeys(points, "query_label")):
        hooked, bridged = (
            record(models[f"base {backend}"], CLEAN, wanted) for backend in ("hooked", "bridge")
        )
        assert set(bridged) == set(hooked) == set(points)
        for name in points:
            there = CLEAN.mask if wanted[name] is None else slice(None)
            same(bridged[name][there], hooked[name][there])


def test_a_hook_sees_the_name_that_it_was_asked_for(models: dict[str, Any]) -> None:
    model, name = models["base bridge"], hook_point("resid_post", 1)
    seen: list[str] = []

    def look(activation: torch.Tensor, hook: Any) -> None:
        seen.append(hook.name)

    with must_fire(model, [(name, look)]) as watched:
        model.run_with_hooks(CLEAN.tokens, fwd_hooks=watched)
    assert seen == [name]
