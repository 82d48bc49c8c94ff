"""A node's effect is the slope of the metric along its gate, prompt by prompt."""

import pytest
import torch

from tests.random_models import random_model
from tests.with_roles import role_pairs
from tl_entity import PromptBatch, box_prompts, load_model, pooled_ablation
from tl_entity.methods.node_effects import AHEAD, PROBABILITY_AMONG, answer_choices, node_effects

MODEL = random_model(n_layers=2, n_heads=2, n_kv_heads=1)


def log_probabilities(prompts, ablation, gates):
    """By hooks written out here: `gates` is [layer, role, head]."""
    rows = ablation.rows(prompts)

    def mix(z, hook):
        own = ablation.outputs[hook.layer()][rows]
        at = gates[hook.layer()][prompts.roles.clamp(min=0)][..., None]
        there = prompts.mask[..., None, None]
        return torch.where(there, own + at * (z - own), z)

    logits = MODEL.run_with_hooks(
        prompts.tokens,
        attention_mask=prompts.attention_mask,
        fwd_hooks=[(lambda name: name.endswith("hook_z"), mix)],
    )
    each = torch.arange(len(prompts))
    final = logits[each, prompts.positions["last"]].log_softmax(-1)
    return final[each, prompts.answers]


def test_effects_are_finite_differences_of_each_prompt() -> None:
    prompts, others = role_pairs(3).clean, role_pairs(5, seed=1).clean
    ablation = pooled_ablation(MODEL, others)
    found = node_effects(MODEL, prompts, ablation, batch_size=2)
    assert found.shape == (3, 2, 3, 2)
    step = 1e-4
    for node in [(0, 0, 0), (0, 1, 1), (1, 2, 0), (0, 2, 1)]:
        expected = torch.zeros(3, dtype=torch.float64)
        for value in (0.25, 0.5, 0.75, 1.0):
            ends = []
            for way in (1, -1):
                gates = torch.full((2, 3, 2), value, dtype=torch.float64)
                gates[node] += way * step
                ends.append(log_probabilities(prompts, ablation, gates))
            expected += (ends[0] - ends[1]) / (2 * step) / 4
        torch.testing.assert_close(
            found[(slice(None), *node)].double(), expected, atol=1e-5, rtol=1e-4
        )


def test_choices_are_the_tokens_of_the_answers_role() -> None:
    tokenizer = load_model("default-base").tokenizer
    prompts = box_prompts(tokenizer, 4, n_boxes=3, seed=0)
    choices = answer_choices(prompts)
    assert choices is not None and choices.shape == (4, 3)
    assert torch.equal(choices[:, 0], prompts.answers)
    for row, mine in zip(prompts.tokens[prompts.where("object")].view(4, 3), choices, strict=True):
        assert set(row.tolist()) == set(mine.tolist())


def test_where_the_answer_is_not_among_the_prompts_tokens_there_are_no_choices() -> None:
    prompts = role_pairs(3).clean
    elsewhere = PromptBatch(
        prompts.tokens,
        torch.full_like(prompts.answers, 99),
        prompts.positions,
        attention_mask=prompts.attention_mask,
        roles=prompts.roles,
        role_names=prompts.role_names,
    )
    assert answer_choices(elsewhere) is None
    assert (
        answer_choices(
            PromptBatch(
                prompts.tokens,
                prompts.answers,
                prompts.positions,
                attention_mask=prompts.attention_mask,
            )
        )
        is None
    )


def test_metrics_among_choices_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    weights = torch.tensor([2.0, 0.0, 1.0]).exp()
    assert float(PROBABILITY_AMONG.value(logits, None)) == pytest.approx(
        float(weights[0] / weights.sum())
    )
    assert float(AHEAD.value(logits, None)) == 1.0
