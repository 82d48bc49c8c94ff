"""Known pairs are what they are said to be, seen from their outputs and attention."""

import pytest
import torch

from tests.random_models import VOCABULARY, random_model
from tl_entity import Head, InputError, box_prompts, evaluate
from tl_entity.hooks.run import answer_logits
from tl_entity.training.guidance import PLANTED
from tl_entity.training.known_pairs import KINDS, known_pair
from tl_entity.training.surgery import (
    double_heads,
    insert_idle_layer,
    reorder_heads,
    rewire_queries,
    rotate_heads,
    scale_queries,
)

SAME_FUNCTION = ("rewritten", "noise", "lower", "redundant")
TOKENS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))


def model(**settings):
    """Grouped queries, biases everywhere, norms that are not one."""
    return random_model(n_layers=3, n_heads=4, n_kv_heads=2, dtype=torch.float64, **settings)


def logits(some):
    return some(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fine_tune_is_better_where_the_truth_says_so(kind, seed):
    pair = known_pair(kind, seed)
    prompts = box_prompts(pair.base.tokenizer, 300, n_boxes=7, seed=40)
    gain = evaluate(pair.tuned, prompts).accuracy - evaluate(pair.base, prompts).accuracy
    if pair.truth.better == "yes":
        assert gain > 0.1
    elif kind == "worse":
        assert gain < -0.1
    elif pair.truth.better == "no":
        assert gain == pytest.approx(0, abs=0.005)
    if kind in SAME_FUNCTION:
        before, after = (answer_logits(some, prompts) for some in (pair.base, pair.tuned))
        assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_pair_and_another_seed_another(kind):
    first, again, other = (known_pair(kind, seed) for seed in (2, 2, 3))
    for one, two, three in zip(
        *(
            [*pair.base.state_dict().values(), *pair.tuned.state_dict().values()]
            for pair in (first, again, other)
        ),
        strict=True,
    ):
        assert torch.equal(one, two)
        if not torch.equal(one, three):
            break
    else:
        pytest.fail("two seeds made the same pair")


@pytest.mark.parametrize("kind", KINDS)
def test_planted_heads_are_where_the_truth_says(kind):
    """At the query label a position detector looks at the label's previous mention."""
    pair = known_pair(kind, 1)
    prompts = box_prompts(pair.base.tokenizer, 50, n_boxes=7, seed=41)
    asked, seen = (prompts.positions[name] for name in ("query_label", "previous_query_label"))
    each = torch.arange(50)
    for some, heads in ((pair.base, pair.truth.base_heads), (pair.tuned, pair.truth.tuned_heads)):
        _, cache = some.run_with_cache(prompts.tokens)
        weights = [
            float(cache["pattern", layer][each, head, asked, seen].mean())
            for layer, head in heads["pos_detector"]
        ]
        assert min(weights) > 0.3


def test_other_bases_inside_the_heads_change_no_logit():
    base = model()
    turned = rotate_heads(base, torch.Generator().manual_seed(3))
    assert torch.allclose(logits(base), logits(turned), atol=1e-12)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        before, after = getattr(base.blocks[1].attn, name), getattr(turned.blocks[1].attn, name)
        assert (before - after).abs().amax(dim=(1, 2)).min() > 0.1


def test_heads_in_another_order_change_no_logit_and_take_their_outputs_along():
    base = model()
    order = [3, 2, 0, 1]
    moved = reorder_heads(base, [[0, 1, 2, 3], order, [0, 1, 2, 3]])
    assert torch.allclose(logits(base), logits(moved), atol=1e-12)
    outputs = [some.run_with_cache(TOKENS)[1]["z", 1] for some in (base, moved)]
    assert torch.allclose(outputs[0][:, :, order], outputs[1], atol=1e-12)


def test_heads_that_share_a_key_are_not_parted():
    with pytest.raises(InputError, match="parted"):
        reorder_heads(model(), [[0, 2, 1, 3]] * 3)


def test_twice_as_many_heads_change_no_logit_whatever_the_copies_share():
    base = model()
    doubled = double_heads(base, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(logits(base), logits(doubled), atol=1e-12)
    assert doubled.cfg.n_heads == 8


@pytest.mark.parametrize("at", [0, 2, 3])
def test_an_idle_layer_changes_no_logit(at):
    base = model()
    deeper = insert_idle_layer(base, at, like=1)
    assert torch.allclose(logits(base), logits(deeper), atol=1e-12)
    assert deeper.blocks[at].attn.W_Q.abs().sum() > 0


def test_scaled_queries_scale_the_scores_of_these_heads_alone():
    base = model()
    scaled = scale_queries(base, [Head(0, 2)], 0.5)
    before, after = (some.run_with_cache(TOKENS)[1]["attn_scores", 0] for some in (base, scaled))
    seen = before.isfinite() & (before > -1e4)
    factor = torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=before.dtype)[None, :, None, None]
    assert torch.allclose((before * factor)[seen], after[seen], atol=1e-12)


def test_a_rewired_query_reads_a_sender_as_often_as_told():
    """Held against the model itself with the sender's output taken from, or added to, the stream
    that this one query reads."""
    base, sender, receiver = model(), Head(0, 1), Head(2, 3)
    for times in (0.0, 1.0, 2.5):
        wide = rewire_queries(base, {receiver: {sender: times}})
        _, cache = base.run_with_cache(TOKENS)
        written = cache["z", 0][:, :, sender.head] @ base.blocks[0].attn.W_O[sender.head]
        scale = cache["blocks.2.ln1.hook_scale"]
        norm = base.blocks[2].ln1.w
        more = ((times - 1) * written / scale * norm) @ base.blocks[2].attn.W_Q[receiver.head]

        def add(q, hook, more=more):
            q[:, :, receiver.head] += more
            return q

        with base.hooks([("blocks.2.attn.hook_q", add)]):
            expected = base(TOKENS)
        assert torch.allclose(wide(TOKENS), expected, atol=1e-4)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="no kind of pair 'better'; there are rewritten"):
        known_pair("better")
    with pytest.raises(InputError, match="isn't below it"):
        rewire_queries(model(), {Head(1, 0): {Head(1, 1): 0.0}})
    with pytest.raises(InputError, match="can't stand at 9"):
        insert_idle_layer(model(), 9)


def test_the_planted_circuit_of_a_moved_pair_is_somewhere_else():
    pair = known_pair("moved", 0)
    assert {h for g in pair.truth.tuned_heads.groups for h in g.heads}.isdisjoint(
        {h for g in PLANTED.groups for h in g.heads}
    )
