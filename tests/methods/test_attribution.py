"""Direct logit attribution and the logit lens against the model's own runs."""

import pandas as pd
import pytest
import torch

from tests.random_models import random_model, random_pairs
from tl_entity import PairBatch, load_model, logit_attribution, logit_lens
from tl_entity.errors import InputError
from tl_entity.hooks import answer_logits, hook_point
from tl_entity.hooks.points import FINAL_NORMALIZED
from tl_entity.methods.attribution import LogitAttribution
from tl_entity.metrics import ACCURACY, ANSWER_BEATS_FOIL, LOG_PROBABILITY, TARGET_LOGIT

MODELS = {
    "RMS": {},
    "layer norm": {"normalization_type": "LN", "final_rms": False},
    "no MLPs": {"attn_only": True, "d_mlp": None, "gated_mlp": False, "act_fn": None},
    "in parallel": {"parallel_attn_mlp": True},
}


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    pairs = random_pairs(5)
    return PairBatch(pairs.clean, pairs.corrupt, pairs.targets, (pairs.targets + 3) % 20)


def difference(model, pairs, hooks=()):
    logits, rows = answer_logits(model, pairs.clean, hooks), torch.arange(len(pairs))
    return logits[rows, pairs.targets] - logits[rows, pairs.foils]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_parts_sum_to_the_metric(pairs, changes):
    model = random_model(n_kv_heads=2, **changes)
    found = logit_attribution(model, pairs, batch_size=2)
    torch.testing.assert_close(found.total, difference(model, pairs), atol=1e-10, rtol=1e-10)
    by_logit = logit_attribution(model, pairs.clean)
    logits = answer_logits(model, pairs.clean)[torch.arange(5), pairs.clean.answers]
    torch.testing.assert_close(by_logit.total, logits, atol=1e-10, rtol=1e-10)
    assert (found.metric, by_logit.metric) == ("logit difference", "target logit")


@pytest.mark.parametrize("changes", [MODELS["RMS"], MODELS["layer norm"]], ids=["RMS", "LN"])
def test_a_part_is_what_is_missing_without_it(pairs, changes):
    """The stream without a part, its final norm's scale held: what the answer loses is the part."""
    model = random_model(n_kv_heads=2, **changes)
    found = logit_attribution(model, pairs)
    seen = {}
    answer_logits(model, pairs.clean, [("ln_final.hook_scale", lambda s, hook: seen.update(s=s))])
    last, rows = pairs.clean.position("last"), torch.arange(5)

    def without(point, head=None):
        def note(activation, hook):
            written = activation[rows, last]
            if head is not None:
                written = written[:, head] @ model.blocks[2].attn.W_O[head]
            seen["w"] = written

        def drop(normalized, hook):
            written = seen["w"]
            if "normalization_type" in changes:
                written = written - written.mean(-1, keepdim=True)
            edited = normalized.clone()
            edited[rows, last] -= written / seen["s"][rows, last]
            return edited

        return difference(model, pairs, [(point, note), (FINAL_NORMALIZED, drop)])

    whole = difference(model, pairs)
    for head in range(4):
        lost = whole - without(hook_point("z", 2), head)
        torch.testing.assert_close(found.heads[2, head], lost, atol=1e-10, rtol=1e-10)
    lost = whole - without(hook_point("mlp_out", 1))
    torch.testing.assert_close(found.mlps[1], lost, atol=1e-10, rtol=1e-10)
    lost = whole - without(hook_point("resid_pre", 0))
    torch.testing.assert_close(found.embedding, lost, atol=1e-10, rtol=1e-10)


def test_biases_are_a_part_of_their_own(pairs):
    """What is left where no part of a layer, and no embedding, writes anything."""
    model = random_model()
    biases = logit_attribution(model, pairs).biases
    logits = model.unembed.b_U.expand(5, -1) + 0
    assert model.blocks[0].attn.b_O.abs().sum() > 0
    with torch.no_grad():
        for block in model.blocks:
            block.attn.b_O.zero_()
    rows = torch.arange(5)
    without = logit_attribution(model, pairs).biases
    expected = logits[rows, pairs.targets] - logits[rows, pairs.foils]
    torch.testing.assert_close(without, expected, atol=1e-10, rtol=1e-10)
    assert (biases - without).abs().min() > 1e-3


@pytest.fixture(scope="module")
def both():
    return [load_model("default-base", backend=b, device="cpu") for b in ("hooked", "bridge")]


def test_both_kinds_of_model_give_the_same(both, pairs):
    hooked, bridged = (logit_attribution(model, pairs) for model in both)
    torch.testing.assert_close(bridged.per_example, hooked.per_example, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(hooked.total, difference(both[0], pairs), atol=1e-4, rtol=1e-4)
    hooked, bridged = (logit_lens(model, pairs) for model in both)
    torch.testing.assert_close(bridged.per_example, hooked.per_example, atol=1e-4, rtol=1e-3)


def test_the_lens_is_the_model_with_its_upper_layers_gone(pairs):
    """The heads and MLPs of the upper layers write nothing, and their biases are nothing."""
    model = random_model()
    lens = logit_lens(model, pairs, batch_size=3)
    rows = torch.arange(5)
    for layer in (3, 2, 1, 0):
        with torch.no_grad():
            for block in model.blocks[layer:]:
                for weights in (block.attn.W_O, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                    weights.zero_()
        logits = answer_logits(model, pairs.clean)
        expected = logits.log_softmax(-1)[rows, pairs.targets]
        torch.testing.assert_close(lens.per_example[layer], expected, atol=1e-9, rtol=1e-9)
    right = logit_lens(random_model(), pairs, metric=ACCURACY)
    assert set(right.per_example.flatten().tolist()) <= {0.0, 1.0}
    assert (lens.metric, right.metric) == ("log probability", "accuracy")


@pytest.mark.parametrize("metric", [LOG_PROBABILITY, ACCURACY, ANSWER_BEATS_FOIL])
def test_what_is_no_sum_of_logits_has_no_parts(pairs, metric):
    with pytest.raises(InputError, match=f"{metric.name!r} is not a sum"):
        logit_attribution(random_model(), pairs, metric=metric)


def test_a_model_that_normalises_what_is_written_is_refused(pairs):
    model = random_model(use_normalization_before_and_after=True)
    with pytest.raises(InputError, match="does not sum to its logits"):
        logit_attribution(model, pairs, metric=TARGET_LOGIT)


def test_it_shows_itself_and_is_kept(pairs, tmp_path):
    found = logit_attribution(random_model(), pairs)
    rows = found.to_dataframe().set_index("part")
    assert len(rows) == 1 + 3 * 4 + 3 + 1
    assert rows.loc["L2H1", "score"] == pytest.approx(found.heads[2, 1].mean().item())
    assert rows.loc["MLP 1", "score"] == pytest.approx(found.mlps[1].mean().item())
    assert rows["score"].sum() == pytest.approx(found.total.mean().item())
    shown = found.table(4)["score"].abs()
    assert shown.is_monotonic_decreasing
    assert shown.iloc[0] == rows["score"].abs().max()
    assert str(found).startswith(f"logit difference {found.total.mean():+.3f} of 5 prompts")
    assert "<table" in found._repr_html_()
    assert {trace.name for trace in found.plot().data} == {"heads", "MLP", "other"}
    torch.testing.assert_close(found.by_layer, found.heads.sum(1) + found.mlps)
    found.save(tmp_path / "found.safetensors")
    again = LogitAttribution.load(tmp_path / "found.safetensors")
    pd.testing.assert_frame_equal(again.to_dataframe(), found.to_dataframe())
    lens = logit_lens(random_model(), pairs)
    assert len(lens.to_dataframe()) == 4
    assert lens.plot().data[0].y[3] == pytest.approx(lens.scores[3].item())
