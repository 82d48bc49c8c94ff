import pytest
import torch

from tests.random_models import random_model, random_pairs, random_prompts, word_tokenizer
from tl_entity import Circuit, Head, InputError, PromptBatch
from tl_entity.hooks import (
    ablate_heads,
    answer_logits,
    freeze_heads,
    hook_point,
    knock_out,
    mask_heads,
    must_fire,
    patch_from_model,
    patch_heads,
    record,
    separate_kv_heads,
)


def z_points(n_layers: int = 3) -> dict[str, None]:
    return {hook_point("z", layer): None for layer in range(n_layers)}


def edited(model, prompts: PromptBatch, hooks: list, names: dict) -> dict[str, torch.Tensor]:
    return record(model, prompts, names, hooks=hooks)


def changed(after: torch.Tensor, before: torch.Tensor) -> set[tuple[int, int, int]]:
    """Entries (prompt, token, head) that differ."""
    return {tuple(entry) for entry in (after != before).any(-1).nonzero().tolist()}


def test_patched_heads_get_the_other_runs_vectors_at_their_own_positions() -> None:
    model, pairs = random_model(), random_pairs()
    cache = record(model, pairs.corrupt, z_points())
    before = record(model, pairs.clean, z_points())
    heads = {"place": [Head(1, 3), Head(1, 0)]}
    hooks = patch_heads(cache, heads, into=pairs.clean, source=pairs.corrupt)
    after = edited(model, pairs.clean, hooks, z_points())
    name = hook_point("z", 1)
    at, read = pairs.clean.position("place"), pairs.corrupt.position("place")
    assert changed(after[name], before[name]) == {
        (row, int(at[row]), head) for row in range(len(pairs)) for head in (0, 3)
    }
    for row in range(len(pairs)):
        assert torch.equal(after[name][row, at[row], 3], cache[name][row, read[row], 3])
    assert torch.equal(after[hook_point("z", 0)], before[hook_point("z", 0)])
    assert not torch.equal(after[hook_point("z", 2)], before[hook_point("z", 2)])


def test_hooks_work_in_plain_transformer_lens() -> None:
    model, pairs = random_model(), random_pairs()
    cache = record(model, pairs.corrupt, z_points())
    hooks = patch_heads(cache, {"last": [Head(2, 1)]}, into=pairs.clean, source=pairs.corrupt)
    mask = pairs.clean.mask.long()
    plain = model.run_with_hooks(pairs.clean.tokens, attention_mask=mask, fwd_hooks=hooks)
    rows = torch.arange(len(pairs))
    assert torch.equal(
        plain[rows, pairs.clean.position("last")], answer_logits(model, pairs.clean, hooks)
    )


def test_frozen_heads_hold_from_a_position_on() -> None:
    model, pairs = random_model(), random_pairs()
    clean = record(model, pairs.clean, z_points())
    push = patch_heads(
        record(model, pairs.corrupt, z_points()),
        {"early": [Head(0, h) for h in range(4)]},
        into=pairs.clean,
        source=pairs.corrupt,
    )
    free = edited(model, pairs.clean, push, z_points())
    name = hook_point("z", 2)
    assert changed(free[name], clean[name])
    held = freeze_heads(clean, pairs.clean, layers=[2], from_position="place")
    after = edited(model, pairs.clean, [*push, *held], z_points())
    at = pairs.clean.position("place")
    moved = changed(after[name], clean[name])
    assert moved
    for row, token, _ in moved:
        inside = at[row] <= token <= pairs.clean.position("last")[row]
        assert not inside


def test_ablation_keeps_the_kept_removes_the_removed_and_leaves_padding() -> None:
    model, prompts = random_model(), random_prompts(4, 7)
    before = record(model, prompts, z_points())
    values = torch.randn(3, 9, 4, 8, dtype=torch.float64)
    circuit = Circuit.entity_tracking(value_fetcher=[(2, 1)])
    after = edited(model, prompts, ablate_heads(values, prompts, keep=circuit), z_points())
    last = prompts.position("last")
    for layer in range(3):
        name = hook_point("z", layer)
        for row in range(4):
            for token in range(7):
                for head in range(4):
                    kept = (layer, head) == (2, 1) and token == last[row]
                    if prompts.mask[row, token] and not kept:
                        assert torch.equal(
                            after[name][row, token, head], values[layer, token, head]
                        )
                    elif kept:
                        assert not torch.equal(
                            after[name][row, token, head], values[layer, token, head]
                        )
    removed = {"place": [Head(0, 2)]}
    after = edited(model, prompts, ablate_heads(values, prompts, remove=removed), z_points())
    name = hook_point("z", 0)
    at = prompts.position("place")
    assert changed(after[name], before[name]) == {(row, int(at[row]), 2) for row in range(4)}
    both = ablate_heads(values, prompts, keep={"last": [Head(2, 1)]}, remove={"last": [Head(2, 1)]})
    after = edited(model, prompts, both, z_points())[hook_point("z", 2)]
    assert torch.equal(after[torch.arange(4), last, 1], values[2, last, 1])


def test_ablation_refuses_prompts_longer_than_its_values() -> None:
    with pytest.raises(InputError, match=r"7 tokens.*only 5 positions"):
        ablate_heads(torch.zeros(3, 5, 4, 8), random_prompts(2, 7), keep={})
    with pytest.raises(InputError, match="keep or which to remove"):
        ablate_heads(torch.zeros(3, 9, 4, 8), random_prompts(2, 7))


def test_mask_mixes_and_gradients_reach_nothing_else() -> None:
    model, pairs = random_model(), random_pairs()
    cache = record(model, pairs.corrupt, z_points())
    heads = {"last": [Head(2, 3), Head(1, 0)]}
    how = {"into": pairs.clean, "source": pairs.corrupt}
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    logits = answer_logits(model, pairs.clean, mask_heads(cache, heads, {"last": mask}, **how))
    # The mask's order is the order of the heads given: L1H0 is replaced, L2H3 is not.
    replaced = patch_heads(cache, {"last": [Head(1, 0)]}, **how)
    torch.testing.assert_close(logits.detach(), answer_logits(model, pairs.clean, replaced))
    logits.logsumexp(-1).sum().backward()
    assert mask.grad is not None
    assert (mask.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    small = 1e-6

    def total(m: list[float]) -> torch.Tensor:
        masks = {"last": torch.tensor(m, dtype=torch.float64)}
        hooks = mask_heads(cache, heads, masks, **how)
        return answer_logits(model, pairs.clean, hooks).logsumexp(-1).sum()

    slope = (total([1.0, small]) - total([1.0, 0.0])) / small
    torch.testing.assert_close(mask.grad[1], slope, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="one entry for each"):
        mask_heads(cache, heads, {"last": torch.ones(3)}, **how)


@pytest.mark.parametrize("point", ["z", "q", "k", "v"])
def test_another_models_vectors_can_be_patched_in(point: str) -> None:
    model, other = random_model(n_kv_heads=2), random_model(n_kv_heads=2, seed=1)
    prompts = random_prompts(3, 6)
    head = Head(1, 1)
    hooks = patch_from_model(other, model, prompts, {"place": [head]}, point=point)
    name = hook_point(point, 1)
    after = record(model, prompts, {name: None}, hooks=hooks)[name]
    rows, at = torch.arange(3), prompts.position("place")
    theirs = record(other, prompts, {name: None})[name]
    assert torch.equal(after[rows, at, 1], theirs[rows, at, 1])
    same = patch_from_model(model, model, prompts, {"place": [head]}, point=point)
    assert torch.equal(answer_logits(model, prompts, same), answer_logits(model, prompts))


def test_models_of_different_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"differ in n_key_value_heads \(2 and None\)"):
        patch_from_model(
            random_model(n_kv_heads=2), random_model(), random_prompts(2, 5), {"last": [Head(0, 0)]}
        )


def test_knocked_out_attention_is_gone_and_the_rest_renormalised() -> None:
    model, prompts = random_model(), random_prompts(4, 7)
    name = hook_point("pattern", 1)
    before = record(model, prompts, {name: None})[name]
    seer, seen = prompts.position("last"), prompts.position("early")
    hooks = knock_out(
        prompts, from_position="last", to_position="early", layers=[1], heads=[Head(1, 2)]
    )
    after = record(model, prompts, {name: None}, hooks=hooks)[name]
    for row in range(4):
        expected = before[row, 2, seer[row]].clone()
        expected[seen[row]] = 0
        torch.testing.assert_close(after[row, 2, seer[row]], expected / expected.sum())
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])
    for every in knock_out(prompts, from_position="last", to_position="early", layers=[0, 1, 2]):
        assert every[1].heads is None
    with pytest.raises(InputError, match="comes after"):
        knock_out(prompts, from_position="early", to_position="last", layers=[0])


def test_hooks_that_do_not_fit_say_where() -> None:
    model, pairs = random_model(), random_pairs()
    cache = record(model, pairs.corrupt, z_points())
    fitting = {"into": pairs.clean, "source": pairs.corrupt}
    with pytest.raises(InputError, match=r"cache lacks blocks\.2\.attn\.hook_q"):
        patch_heads(cache, {"last": [Head(2, 0)]}, **fitting, point="q")
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_z has 4 heads; L0H9"):
        patch_heads(cache, {"last": [Head(0, 9)]}, **fitting)
    with pytest.raises(InputError, match="'sideways' is no hook point"):
        patch_heads(cache, {"last": [Head(0, 0)]}, **fitting, point="sideways")
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_z has shape .*not of prompts"):
        patch_heads(cache, {"last": [Head(0, 0)]}, into=pairs.clean)
    hooks = patch_heads(cache, {"last": [Head(0, 0)]}, **fitting)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_z has shape \(2, .*batch 4"):
        answer_logits(model, pairs.clean[:2], hooks)
    ((_, edit),) = hooks
    with pytest.raises(InputError, match=r"blocks\.0\.hook_resid_pre has shape"):
        answer_logits(model, pairs.clean, [("blocks.0.hook_resid_pre", edit)])


def test_unknown_and_silent_hooks_are_errors() -> None:
    model, prompts = random_model(), random_prompts(2, 5)
    with pytest.raises(InputError, match=r"no hook point 'blocks\.9\.attn\.hook_z'"):
        record(model, prompts, {"blocks.9.attn.hook_z": None})
    # Needs use_attn_result; without it TransformerLens passes the hook over in silence.
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.hook_result never fired"):
        record(model, prompts, {"blocks.1.attn.hook_result": None})
    hooks = [(hook_point("z", 2), lambda z, hook: z)]
    with (
        pytest.raises(InputError, match=r"blocks\.2\.attn\.hook_z never fired"),
        must_fire(model, hooks) as watched,
    ):
        model.run_with_hooks(prompts.tokens, fwd_hooks=watched, stop_at_layer=2)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_separate_kv_heads_spares_the_siblings_and_restores_the_model() -> None:
    model, prompts = random_model(n_kv_heads=2), random_prompts(3, 6)
    before = answer_logits(model, prompts)
    with separate_kv_heads(model):
        values = record(model, prompts, {hook_point("v", 1): None})[hook_point("v", 1)]
        assert values.shape[2] == 4
        torch.testing.assert_close(answer_logits(model, prompts), before)
        z = record(model, prompts, z_points())[hook_point("z", 1)]
        cache = {hook_point("v", 1): torch.zeros_like(values)}
        hooks = patch_heads(cache, {"place": [Head(1, 1)]}, into=prompts, point="v")
        after = record(model, prompts, z_points(), hooks=hooks)[hook_point("z", 1)]
    assert {head for _, _, head in changed(after, z)} == {1}
    assert torch.equal(answer_logits(model, prompts), before)


def test_record_keeps_only_what_is_asked_for() -> None:
    model, prompts = random_model(), random_prompts(3, 6)
    whole, at = hook_point("z", 0), hook_point("resid_mid", 2)
    cache = record(model, prompts, {whole: None, at: "place"})
    assert set(cache) == {whole, at}
    assert cache[whole].shape == (3, 6, 4, 8)
    everything = record(model, prompts, {at: None})[at]
    rows = torch.arange(3)
    assert torch.equal(cache[at], everything[rows, prompts.position("place")])


def test_a_tokenizer_that_pads_on_the_left_does_not_hide_prompt_tokens() -> None:
    model, prompts = random_model(), random_prompts(1, 5)
    expected = answer_logits(model, prompts)
    model.tokenizer = word_tokenizer(["a"])
    model.tokenizer.padding_side = "left"
    model.tokenizer.pad_token_id = int(prompts.tokens[0, 0])
    assert torch.equal(answer_logits(model, prompts), expected)
