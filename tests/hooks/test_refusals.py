import pytest
import torch

from tests.random_models import random_model, random_pairs, random_prompts
from tl_entity import Head, InputError, evaluate, path_patch
from tl_entity.hooks import (
    ablate_heads,
    answer_logits,
    freeze_heads,
    hook_point,
    knock_out,
    mask_heads,
    patch_from_model,
    patch_heads,
    record,
)

MODEL, PAIRS = random_model(), random_pairs()
Z_POINTS: dict[str, str | None] = {hook_point("z", layer): None for layer in range(3)}
CORRUPT = record(MODEL, PAIRS.corrupt, Z_POINTS)


def test_positions_that_no_prompt_has_are_named_by_every_builder() -> None:
    prompts, nowhere = PAIRS.clean, {"nowhere": [Head(0, 0)]}
    clean = record(MODEL, prompts, Z_POINTS)
    mask = {"nowhere": torch.ones(1)}
    for build in (
        lambda: patch_heads(CORRUPT, nowhere, into=prompts, source=PAIRS.corrupt),
        lambda: freeze_heads(clean, prompts, layers=[0], from_position="nowhere"),
        lambda: ablate_heads(torch.zeros(3, 9, 4, 8), prompts, remove=nowhere),
        lambda: mask_heads(CORRUPT, nowhere, mask, into=prompts, source=PAIRS.corrupt),
        lambda: knock_out(prompts, from_position="last", to_position="nowhere", layers=[0]),
        lambda: patch_from_model(MODEL, MODEL, prompts, nowhere),
    ):
        with pytest.raises(
            InputError, match=r"no position 'nowhere'; they have last, place, early"
        ):
            build()


def test_an_edit_made_for_other_prompts_does_not_touch_the_run() -> None:
    hooks = freeze_heads(CORRUPT, PAIRS.corrupt, layers=[1])
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.hook_z has shape"):
        answer_logits(MODEL, PAIRS.clean, hooks)
    hooks = knock_out(PAIRS.clean, from_position="last", to_position="early", layers=[2])
    with pytest.raises(InputError, match=r"blocks\.2\.attn\.hook_attn_scores has shape"):
        answer_logits(MODEL, PAIRS.clean[:3], hooks)


@pytest.mark.parametrize("name", ["blocks.0.hook_mlp_in", "blocks.2.hook_q_input"])
def test_points_that_need_a_flag_are_not_passed_over_in_silence(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} never fired"):
        answer_logits(MODEL, PAIRS.clean, [(name, lambda activation, hook: activation)])


def test_layers_that_no_model_has_are_named() -> None:
    prompts = random_prompts(2, 5)
    with pytest.raises(InputError, match=r"no hook point 'blocks\.3\.attn\.hook_attn_scores'"):
        answer_logits(
            MODEL,
            prompts,
            knock_out(prompts, from_position="last", to_position="early", layers=[3]),
        )
    with pytest.raises(InputError, match="no head L3H0"):
        patch_from_model(MODEL, MODEL, prompts, {"last": [Head(3, 0)]})


def test_knocking_out_a_head_that_no_model_has_names_it() -> None:
    hooks = knock_out(
        PAIRS.clean, from_position="last", to_position="early", layers=[1], heads=[Head(1, 9)]
    )
    with pytest.raises(InputError):
        answer_logits(MODEL, PAIRS.clean, hooks)


def test_negative_heads_are_refused() -> None:
    with pytest.raises(InputError):
        patch_heads(CORRUPT, {"last": [Head(0, -1)]}, into=PAIRS.clean, source=PAIRS.corrupt)


def test_prompts_longer_than_the_model_takes() -> None:
    model, prompts = random_model(n_ctx=8), random_prompts(2, 9)
    assert prompts.tokens.shape[1] > 8
    with pytest.raises(InputError, match="tokens, and the model takes 8"):
        evaluate(model, prompts)
    with pytest.raises(InputError, match="tokens, and the model takes 8"):
        path_patch(model, random_pairs(2))
