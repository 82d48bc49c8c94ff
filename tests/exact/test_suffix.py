"""Edits to a recorded run against the same edits in a plain run."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_models import random_model, random_prompts
from tl_entity import Head, InputError
from tl_entity.exact.suffix import CleanRun
from tl_entity.hooks.edits import (
    Hook,
    KnockOutAttention,
    MaskHeads,
    ReplaceHeads,
    ReplaceToken,
    ReplaceWhere,
    freeze_heads,
    knock_out,
    patch_heads,
)
from tl_entity.hooks.points import hook_point, separate_kv_heads
from tl_entity.hooks.run import answer_logits, record
from tl_entity.tasks.batches import PromptBatch

POINTS = ["q", "k", "v", "z"]


def random_edit(
    draw: st.DrawFn, prompts: PromptBatch, cfg: dict[str, Any], position: str, layer: int
) -> Hook:
    n, n_tokens = prompts.tokens.shape
    n_heads, d_head = cfg["n_heads"], cfg["d_head"]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    heads = draw(st.lists(st.integers(0, n_heads - 1), min_size=1, unique=True))
    at = prompts.position(position)
    kind = draw(st.sampled_from([ReplaceHeads, MaskHeads, ReplaceWhere, KnockOutAttention]))
    values = torch.randn(n, len(heads), d_head, generator=generator, dtype=torch.float64)
    point = draw(st.sampled_from(POINTS))
    if kind is KnockOutAttention:
        share = torch.rand(n, generator=generator)
        seen = ((at + 1) * share).long()
        # Not every key of a token may go, or nothing is left to attend to.
        first = prompts.mask.int().argmax(1)
        later = torch.where(at > first, seen.clamp(min=first + 1).minimum(at), at)
        if bool((later == first).any()):
            return hook_point("z", layer), ReplaceHeads(at, torch.tensor(heads), values)
        return hook_point("attn_scores", layer), KnockOutAttention(at, later, tuple(heads))
    if kind is ReplaceWhere:
        index = torch.arange(n_tokens)
        after = (index >= at[:, None]) & prompts.mask
        where = after[..., None] & (torch.rand(n, n_tokens, n_heads, generator=generator) < 0.5)
        everywhere = torch.randn(1, n_tokens, n_heads, d_head, generator=generator)
        return hook_point(point, layer), ReplaceWhere(where, everywhere.double())
    if kind is MaskHeads:
        mask = torch.rand(len(heads), generator=generator, dtype=torch.float64)
        return hook_point(point, layer), MaskHeads(at, torch.tensor(heads), mask, values)
    return hook_point(point, layer), ReplaceHeads(at, torch.tensor(heads), values)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    n_kv_heads = draw(st.sampled_from([1, 2, 3]))
    cfg = {
        "n_layers": draw(st.integers(1, 4)),
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.integers(1, 2)),
        "d_head": draw(st.sampled_from([2, 4, 10])),
        "seed": draw(st.integers(0, 3)),
    }
    prompts = random_prompts(
        draw(st.integers(1, 4)),
        draw(st.integers(4, 8)),
        left=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )
    positions = draw(st.lists(st.sampled_from(["last", "place", "early"]), min_size=1, unique=True))
    first = draw(st.integers(0, cfg["n_layers"] - 1))
    layers = st.integers(first, cfg["n_layers"] - 1)
    variants = [
        [
            random_edit(draw, prompts, cfg, draw(st.sampled_from(positions)), draw(layers))
            for _ in range(draw(st.integers(0, 3)))
        ]
        for _ in range(draw(st.integers(1, 3)))
    ]
    return {
        "cfg": cfg,
        "prompts": prompts,
        "record": {
            "first_layer": first,
            "positions": positions,
            "begins": draw(st.none() | st.lists(layers, max_size=2)),
        },
        "variants": variants,
        "memory": draw(st.sampled_from([None, 1])),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_edits_of_a_recorded_run_are_those_of_a_plain_run(case: dict) -> None:
    model, prompts = random_model(**case["cfg"]), case["prompts"]
    run = CleanRun.record(model, prompts, **case["record"])
    found = run.answer_logits_each(case["variants"], memory=case["memory"])
    for logits, hooks in zip(found, case["variants"], strict=True):
        edits_kv = any(name.endswith(("hook_k", "hook_v")) for name, _ in hooks)
        with separate_kv_heads(model) if edits_kv else nullcontext():
            expected = answer_logits(model, prompts, hooks)
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


def recorded(position: str = "place", first_layer: int = 1) -> tuple[Any, PromptBatch, CleanRun]:
    model, prompts = random_model(n_kv_heads=2), random_prompts(5, 9)
    run = CleanRun.record(model, prompts, first_layer=first_layer, positions=[position])
    return model, prompts, run


def test_no_edit_gives_the_plain_run() -> None:
    model, prompts, run = recorded()
    torch.testing.assert_close(run.answer_logits(), answer_logits(model, prompts))


def test_only_some_tokens_logits() -> None:
    _, prompts, run = recorded()
    wanted = torch.tensor([[3, 7, 3]]).expand(len(prompts), -1)
    whole = run.answer_logits()
    torch.testing.assert_close(
        run.answer_logits(tokens=wanted), whole[:, [3, 7, 3]], atol=1e-12, rtol=1e-12
    )


def test_gradients_of_a_mask_are_those_of_a_plain_run() -> None:
    model, prompts, run = recorded()
    heads = torch.tensor([0, 3])
    other = torch.randn(5, 2, 8, dtype=torch.float64)
    gradients = []
    for engine in (run.answer_logits, lambda hooks: answer_logits(model, prompts, hooks)):
        mask = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
        hooks = [
            (hook_point("z", layer), MaskHeads(prompts.position("place"), heads, mask, other))
            for layer in (1, 2)
        ]
        engine(hooks).square().sum().backward()
        gradients.append(mask.grad)
    assert gradients[0].abs().min() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_patched_with_itself_changes_nothing_that_counts() -> None:
    model, prompts, run = recorded()
    z = record(model, prompts, {hook_point("z", 1): None})
    hooks = patch_heads(z, {"place": [Head(1, 0), Head(1, 2)]}, into=prompts)
    torch.testing.assert_close(run.answer_logits(hooks), run.answer_logits(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        (lambda z, p: patch_heads(z, {"early": [Head(1, 0)]}, into=p), "named position"),
        (lambda z, p: patch_heads(z, {"place": [Head(0, 0)]}, into=p), "below layer 1"),
        (lambda z, p: freeze_heads(z, p, layers=[1]), "named position"),
        (
            lambda z, p: knock_out(p, from_position="early", to_position="early", layers=[1]),
            "named position",
        ),
        (
            lambda z, p: [("blocks.1.hook_mlp_out", ReplaceToken(p.position("last"), z["x"]))],
            'engine="hooks"',
        ),
        (lambda z, p: [("blocks.1.attn.hook_z", lambda activation, hook: activation)], "hooks"),
        (
            lambda z, p: [("blocks.1.hook_nothing", lambda activation, hook: activation)],
            "no hook point",
        ),
    ],
    ids=["token", "layer", "where", "knockout", "point", "kind", "name"],
)
def test_what_was_not_recorded_is_refused(hooks: Any, reason: str) -> None:
    model, prompts, run = recorded()
    cache = record(model, prompts, {hook_point("z", layer): None for layer in (0, 1)})
    cache["x"] = torch.zeros(len(prompts), 24, dtype=torch.float64)
    with pytest.raises(InputError, match=reason):
        run.answer_logits(hooks(cache, prompts))


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="3 layers"):
        recorded(first_layer=3)
    with pytest.raises(InputError, match="at least one position"):
        model, prompts = random_model(), random_prompts(2, 5)
        CleanRun.record(model, prompts, first_layer=0, positions=[])
