"""Circuits in an ablated run against the same ablation in a plain run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_models import random_model, random_prompts
from tl_entity import Head, InputError
from tl_entity.exact.ablation import AblatedRun
from tl_entity.exact.blocks import unembed
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.run import answer_logits


@st.composite
def cases(draw: st.DrawFn) -> dict:
    n_kv_heads = draw(st.sampled_from([1, 2, 3]))
    n_heads = n_kv_heads * draw(st.integers(1, 2))
    n_layers = draw(st.integers(1, 4))
    heads = st.builds(Head, st.integers(0, n_layers - 1), st.integers(0, n_heads - 1))
    circuit = st.dictionaries(
        st.sampled_from(["last", "place", "early"]), st.lists(heads, max_size=4, unique=True)
    )
    return {
        "model": {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": draw(st.sampled_from([2, 4, 10])),
            "seed": draw(st.integers(0, 3)),
        },
        "prompts": {
            "n_prompts": draw(st.integers(1, 4)),
            "n_tokens": draw(st.integers(3, 8)),
            "seed": draw(st.integers(0, 9)),
        },
        "circuits": draw(st.lists(circuit, min_size=1, max_size=4)),
        "memory": draw(st.sampled_from([None, 1])),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_circuits_are_those_of_a_plain_run(case: dict) -> None:
    model, prompts = random_model(**case["model"]), random_prompts(**case["prompts"])
    cfg = model.cfg
    generator = torch.Generator().manual_seed(1)
    shape = (cfg.n_layers, prompts.tokens.shape[1] + 1, cfg.n_heads, cfg.d_head)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    run = AblatedRun.record(model, prompts, values)
    resid = run.answer_resid_each(case["circuits"], memory=case["memory"])
    for found, circuit in zip(unembed(model, resid), case["circuits"], strict=True):
        expected = answer_logits(model, prompts, ablate_heads(values, prompts, keep=circuit))
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_a_kept_head_matters() -> None:
    """The agreement above would prove nothing if every circuit gave the same."""
    model, prompts = random_model(n_kv_heads=2), random_prompts(4, 8)
    values = torch.zeros(3, 8, 4, 8, dtype=torch.float64)
    run = AblatedRun.record(model, prompts, values)
    none, one, elsewhere = run.answer_resid_each(
        [{}, {"place": [Head(0, 1)], "last": [Head(2, 0)]}, {"last": [Head(2, 0)]}]
    )
    assert (one - none).abs().amax(-1).min() > 1e-2
    assert (one - elsewhere).abs().amax() > 1e-2


def test_left_padded_prompts_and_short_values_are_refused() -> None:
    model = random_model()
    with pytest.raises(InputError, match="padded on the right"):
        AblatedRun.record(model, random_prompts(3, 6, left=True), torch.zeros(3, 6, 4, 8).double())
    with pytest.raises(InputError, match="only 5 positions"):
        AblatedRun.record(model, random_prompts(3, 6), torch.zeros(3, 5, 4, 8).double())
