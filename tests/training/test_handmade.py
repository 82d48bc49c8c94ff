"""The hand-made models carry what they are said to, at heads that look where they are said to."""

import pytest
import torch

from tl_entity import Head, box_prompts, desideratum_pairs, load_model
from tl_entity.training.handmade import AT, handmade_circuit, handmade_model

TOKENIZER = load_model("default-base").tokenizer
PLACES = [[3, 1, 4, 0, 5, 2, 6, 7]] * 4
MODELS = {code: handmade_model(TOKENIZER, code, 8.0, PLACES, 5) for code in ("position", "label")}
HEADS = handmade_circuit(PLACES)


def answers_with(model, pairs, heads, position):
    """How often the target is named with outputs of heads at a position from the counterfactual."""
    _, cache = model.run_with_cache(pairs.corrupt.tokens)
    each = torch.arange(len(pairs))
    into, source = pairs.clean.positions[position], pairs.corrupt.positions[position]

    def patch(z, hook):
        for layer, head in heads:
            if layer == hook.layer():
                z[each, into, head] = cache["z", layer][each, source, head]
        return z

    named = model.run_with_hooks(
        pairs.clean.tokens, fwd_hooks=[(lambda name: name.endswith("hook_z"), patch)]
    )[:, -1].argmax(-1)
    return float((named == pairs.targets).float().mean())


@pytest.mark.parametrize(("code", "other"), [("position", "label"), ("label", "position")])
@pytest.mark.parametrize(
    ("group", "position"), [("pos_detector", "query_label"), ("pos_transmitter", "last")]
)
def test_the_same_heads_carry_one_thing_or_the_other(code, other, group, position) -> None:
    kinds = {"position": "position", "label": "box_label_value"}
    rates = {
        which: answers_with(
            MODELS[code],
            desideratum_pairs(TOKENIZER, kinds[which], 60, n_boxes=7, seed=1),
            HEADS[group],
            position,
        )
        for which in (code, other)
    }
    assert rates[code] > 0.6
    assert rates[other] < 0.2


@pytest.mark.parametrize("code", MODELS)
def test_fetchers_carry_the_object_and_all_look_where_they_should(code) -> None:
    model = MODELS[code]
    pairs = desideratum_pairs(TOKENIZER, "object_value", 60, n_boxes=7, seed=1)
    assert answers_with(model, pairs, HEADS["value_fetcher"], "last") > 0.6
    prompts = box_prompts(TOKENIZER, 40, n_boxes=7, seed=2)
    _, cache = model.run_with_cache(prompts.tokens)
    at = {name: prompts.positions[name] for name in prompts.positions}
    looks = [
        ("value_fetcher", "last", "previous_query_label"),
        ("pos_transmitter", "last", "query_label"),
        ("pos_detector", "query_label", "previous_query_label"),
    ]
    for group, source, target in looks:
        for layer, head in HEADS[group]:
            seen = cache["pattern", layer][torch.arange(40), head, at[source], at[target]]
            assert float(seen.mean()) > 0.8
    for layer, head in HEADS["struct_reader"][:2]:
        seen = cache["pattern", layer][
            torch.arange(40), head, at["previous_query_label"], at["correct_object"]
        ]
        assert float(seen.min()) > 0.9


def test_only_the_readers_of_segments_differ() -> None:
    one, other = (model.state_dict() for model in MODELS.values())
    for name, weight in one.items():
        if torch.equal(weight, other[name]):
            continue
        assert name.startswith("blocks.0.attn.")
        differing = (weight != other[name]).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert {Head(0, h) for h in differing} <= set(HEADS["struct_reader"][2:])


def test_the_code_of_a_position_is_its_number() -> None:
    prompts = box_prompts(TOKENIZER, 20, n_boxes=7, seed=3)
    _, cache = MODELS["position"].run_with_cache(prompts.tokens)
    labels = prompts.where("label")
    codes = cache["resid_post", 0][labels][:, AT.code].view(20, 7, -1)
    assert torch.equal(codes.argmax(-1), torch.arange(7).expand(20, -1))
