"""Cross-model patching against a forward written from scratch, and where the answer is known."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.independent import Forward
from tests.methods.planted import COPY, NOTE, planted_model, planted_pairs
from tests.random_models import random_model, random_prompts, word_tokenizer
from tl_entity import (
    Circuit,
    Group,
    Head,
    InputError,
    PromptBatch,
    box_prompts,
    evaluate,
    load_model,
)
from tl_entity.exact.suffix import CleanRun
from tl_entity.hooks import answer_logits, hook_point, patch_from_model, record
from tl_entity.hooks.cross_model import (
    check_same_architecture,
    input_hooks,
    patch_inputs_from_model,
)
from tl_entity.methods.cmap import WHOLE_CIRCUIT, cmap, cmap_by_group, cmap_each
from tl_entity.models.registry import planted_circuit
from tl_entity.stats import paired_share

SHAPE = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
BASE, TUNED = random_model(**SHAPE), random_model(**SHAPE, seed=1)
# Heads that share keys and values with others, in one layer and across layers and positions.
HEADS = {"place": [Head(0, 1), Head(1, 2)], "last": [Head(1, 3), Head(2, 0), Head(2, 1)]}
PATCHES = ["output", "q", "k", "v", "qk", "kv", "qv", "qkv"]


def by_hand(tokens: Tensor, positions: dict[str, int], patch: str, last: int) -> Tensor:
    """Log probabilities of the base under the definition, one prompt without padding."""
    forward = Forward(BASE)
    _, their_z, theirs = Forward(TUNED).run(tokens)
    vectors: dict[str, Tensor] = {}

    def keep(layer: int, head: int, which: str, x: Tensor) -> Tensor:
        vectors[which] = x
        return x

    def patched(layer: int, head: int, z: Tensor) -> Tensor:
        z = z.clone()
        for name, heads in HEADS.items():
            if Head(layer, head) not in heads:
                continue
            at = positions[name]
            if patch == "output":
                z[at] = their_z[layer, head][at]
                continue
            q, k, v = (
                theirs[layer, head, which] if which in patch else vectors[which] for which in "qkv"
            )
            q, k = forward.rotate(q), forward.rotate(k)
            scores = k[: at + 1] @ q[at] / math.sqrt(forward.cfg.d_head)
            z[at] = scores.softmax(0) @ v[: at + 1]
        return z

    return forward.run(tokens, edit_input=keep, edit_z=patched)[0][last]


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_answers_are_those_of_the_definition(patch: str, left: bool, engine: str) -> None:
    prompts = random_prompts(6, 8, left=left, seed=3)
    found = cmap(BASE, TUNED, prompts, HEADS, patch=patch, engine=engine, batch_size=4)
    alone = evaluate(BASE, prompts)
    for row in range(len(prompts)):
        mask = prompts.mask[row]
        start = int(mask.int().argmax())
        positions = {name: int(at[row]) - start for name, at in prompts.positions.items()}
        expected = by_hand(prompts.tokens[row][mask], positions, patch, positions["last"])
        answer = int(prompts.answers[row])
        assert found.answer_log_probability[row].item() == pytest.approx(
            expected[answer].item(), abs=1e-6
        )
        assert int(found.predicted[row]) == int(expected.argmax())
    assert not torch.allclose(found.answer_log_probability, alone.answer_log_probability)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_model_patched_with_itself_does_not_change(patch: str, engine: str) -> None:
    prompts = random_prompts(5, 8, seed=1)
    found = cmap(BASE, BASE, prompts, HEADS, patch=patch, engine=engine)
    alone = evaluate(BASE, prompts)
    assert torch.equal(found.predicted, alone.predicted)
    exact = engine == "hooks" and patch in ("output", "q")
    torch.testing.assert_close(
        found.answer_log_probability,
        alone.answer_log_probability,
        atol=0 if exact else 1e-12,
        rtol=0,
    )


def at_every_token(length: int) -> tuple[PromptBatch, dict[str, list[Head]]]:
    tokens = random_prompts(4, length, seed=6).tokens
    every = {f"token {i}": torch.full((4,), i) for i in range(length)}
    positions = {**every, "last": every[f"token {length - 1}"]}
    prompts = PromptBatch(tokens, torch.zeros(4, dtype=torch.long), positions)
    heads = [Head(layer, head) for layer in range(3) for head in range(4)]
    return prompts, dict.fromkeys(every, heads)


@pytest.mark.parametrize("patch", ["output", "qkv"])
def test_all_heads_at_all_positions_put_out_what_the_tuned_models_do(patch: str) -> None:
    prompts, heads = at_every_token(5)
    hooks = (
        patch_from_model(TUNED, BASE, prompts, heads)
        if patch == "output"
        else patch_inputs_from_model(TUNED, BASE, prompts, heads, inputs=patch)
    )
    points = {hook_point("z", layer): None for layer in range(3)}
    ours = record(BASE, prompts, points, hooks=hooks)
    theirs = record(TUNED, prompts, points)
    for point in points:
        torch.testing.assert_close(ours[point], theirs[point], atol=1e-12, rtol=0)


@pytest.mark.parametrize("patch", ["output", "qkv"])
@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_with_attention_as_the_only_difference_all_heads_make_the_tuned_model(
    patch: str, engine: str
) -> None:
    prompts, heads = at_every_token(5)
    tuned = copy.deepcopy(BASE)
    for layer in range(3):
        for name in ("W_Q", "_W_K", "_W_V", "b_Q"):
            theirs = getattr(TUNED.blocks[layer].attn, name).data
            getattr(tuned.blocks[layer].attn, name).data = theirs.clone()
    found = cmap(BASE, tuned, prompts, heads, patch=patch, engine=engine)
    torch.testing.assert_close(
        found.answer_log_probability,
        evaluate(tuned, prompts).answer_log_probability,
        atol=1e-10,
        rtol=0,
    )


@pytest.mark.parametrize("inputs", ["q", "k", "v", "qkv"])
def test_nothing_but_the_head_at_its_token_is_touched(inputs: str) -> None:
    prompts = random_prompts(5, 8, seed=2)
    point = hook_point("z", 1)
    hooks = patch_inputs_from_model(TUNED, BASE, prompts, {"place": [Head(1, 2)]}, inputs=inputs)
    before, after = (
        record(BASE, prompts, {point: None}, hooks=some)[point] for some in ([], hooks)
    )
    touched = torch.zeros_like(before, dtype=torch.bool)
    touched[torch.arange(5), prompts.position("place"), 2] = True
    # Its sibling L1H3, which shares keys and values, and all other tokens are as they were.
    assert torch.equal(before[~touched], after[~touched])
    if inputs == "qkv":
        theirs = record(TUNED, prompts, {point: None})[point]
        torch.testing.assert_close(after[touched], theirs[touched], atol=1e-12, rtol=0)
    else:
        assert not torch.allclose(before[touched], after[touched])


def test_unpatched_vectors_are_those_of_the_patched_run() -> None:
    """A lower head patched at an earlier token changes the keys that a higher head reads; with its
    queries patched, it must see the changed ones."""
    prompts = random_prompts(3, 8, seed=2)
    lower, higher = {"early": [Head(0, 0)]}, {"last": [Head(2, 1)]}
    both = {**lower, **higher}
    name = hook_point("q", 2)
    first = patch_from_model(TUNED, BASE, prompts, lower, point="q")
    second = patch_from_model(TUNED, BASE, prompts, higher, point="q")
    expected = answer_logits(BASE, prompts, [*first, *second]).argmax(-1)
    found = cmap(BASE, TUNED, prompts, both, patch="q")
    assert torch.equal(found.predicted, expected)
    assert [point for point, _ in second] == [name]


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_several_choices_are_each_one_alone(engine: str) -> None:
    prompts = random_prompts(5, 8, seed=4)
    choices = [
        (HEADS, "output"),
        ({}, "q"),
        ({"last": [Head(0, 0)]}, "k"),
        (HEADS, "kv"),
        ({"place": [], "last": [Head(2, 3)]}, "output"),
    ]
    done: list[int] = []
    found = cmap_each(
        BASE, TUNED, prompts, choices, engine=engine, batch_size=2, progress=done.append
    )
    for one, (heads, patch) in zip(found, choices, strict=True):
        alone = cmap(BASE, TUNED, prompts, heads, patch=patch, engine="hooks")
        torch.testing.assert_close(
            one.answer_log_probability, alone.answer_log_probability, atol=1e-10, rtol=0
        )
    assert sum(done) == 5 * 5
    assert torch.allclose(
        found[1].answer_log_probability, evaluate(BASE, prompts).answer_log_probability
    )


GROUPS = Circuit((Group("copier", "last", (COPY,)), Group("note_taker", "value", (NOTE,))))


@pytest.mark.parametrize(
    ("broken", "head", "brings"),
    [("Q", COPY, "q"), ("K", COPY, "k"), ("V", COPY, "v"), ("V", NOTE, "v"), ("O", COPY, "")],
)
def test_what_is_broken_in_the_base_is_what_patching_repairs(
    broken: str, head: Head, brings: str
) -> None:
    tuned, base = planted_model(), planted_model()
    attn = base.blocks[head.layer].attn
    getattr(attn, f"W_{broken}").data[head.head] = 0
    prompts = planted_pairs(40, seed=3).clean
    found = cmap_by_group(base, tuned, prompts, GROUPS, seed=0)
    assert found.tuned.accuracy == 1.0
    assert found.base.accuracy < 0.5
    group = "copier" if head == COPY else "note_taker"
    for entry in found.entries:
        evaluations = found.base, entry.evaluation, found.tuned
        share = paired_share(*(evaluation.correct.numpy() for evaluation in evaluations))
        assert (entry.recovered, entry.recovered_interval) == share
        assert entry.recovered_interval.low < entry.recovered < entry.recovered_interval.high
        # Patching outputs repairs queries, keys and values, but not what is made of the output.
        repaired = brings and entry.patch in ("output", brings)
        if repaired and entry.group in (group, WHOLE_CIRCUIT):
            assert entry.evaluation.accuracy == 1.0
            assert entry.recovered == 1.0
            # Right on just the tuned model's prompts, and yet 40 are not all.
            low, high = entry.recovered_interval
            assert 0.8 < low < 0.95 and 1.05 < high < 1.2
        elif head == COPY:
            assert entry.evaluation.accuracy < 0.5
            assert entry.recovered < 0.5
    # The other way round, the broken head breaks the tuned model; swapped, it gains what is lost.
    back = cmap_by_group(tuned, base, prompts, GROUPS, seed=0, patches=["output"])
    assert back.base.accuracy == 1.0
    if brings:
        assert back[group, "output"].gain < -0.5
        assert back[group, "output"].gain_interval.high < 0


def test_what_each_group_brings_is_counted() -> None:
    tuned, base = planted_model(), planted_model()
    base.blocks[COPY.layer].attn.W_V.data[COPY.head] *= 0.35
    prompts = planted_pairs(40, seed=3).clean
    done: list[int] = []
    found = cmap_by_group(
        base, tuned, prompts, GROUPS, seed=0, patches=["output", "v"], progress=done.append
    )
    assert sum(done) == 2 * 3 * 40
    assert [(e.group, e.patch) for e in found.entries] == [
        (group, patch)
        for patch in ("output", "v")
        for group in ("copier", "note_taker", WHOLE_CIRCUIT)
    ]
    copier = found["copier", "output"]
    assert copier.gain == copier.evaluation.accuracy - found.base.accuracy
    table = found.to_dataframe()
    assert table["group"].tolist()[:2] == ["base", "tuned"]
    assert (table["correct"] / 40 == table["accuracy"]).all()
    assert table["heads"].tolist()[2:5] == ["L1H2", "L0H1", "L1H2 L0H1"]
    assert "of the gain" in str(copier)
    assert "tuned 1.000" in str(found)
    with pytest.raises(KeyError):
        found["copier", "q"]
    same = cmap_by_group(base, base, prompts, GROUPS, seed=0, patches=["output"])
    assert all(entry.gain == 0 for entry in same.entries)
    assert all(math.isnan(entry.recovered) for entry in same.entries)
    # Of what may be nothing there is no share, and no interval of one.
    assert np.isnan([entry.recovered_interval for entry in same.entries]).all()
    assert "no share of the gain, which may be nothing on these prompts" in str(same.entries[0])


def test_the_default_pairs_gain_comes_from_its_value_fetchers() -> None:
    base, tuned = load_model("default-base"), load_model("default-tuned")
    file = planted_circuit("default-base")
    assert file is not None
    prompts = box_prompts(base.tokenizer, 120, seed=0)
    found = cmap_by_group(
        base, tuned, prompts, Circuit.load(file), seed=0, patches=["output", "qkv"]
    )
    for patch in ("output", "qkv"):
        assert found["value_fetcher", patch].recovered_interval.low > 0.3
        assert found[WHOLE_CIRCUIT, patch].recovered_interval.low > 0.3
        assert found["pos_detector", patch].gain_interval.high < 0
    for name in ("value_fetcher", "pos_transmitter", "pos_detector", "struct_reader"):
        torch.testing.assert_close(
            found[name, "output"].evaluation.answer_log_probability,
            found[name, "qkv"].evaluation.answer_log_probability,
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("patch", ["", "x", "qq", "z", "outputs", "Q"])
def test_a_patch_of_something_else_is_refused(patch: str) -> None:
    with pytest.raises(InputError, match="can't be patched"):
        cmap(BASE, TUNED, random_prompts(2, 5), HEADS, patch=patch)


def test_what_cannot_be_patched_is_refused() -> None:
    prompts = random_prompts(3, 6)
    with pytest.raises(InputError, match="no head L3H0"):
        cmap(BASE, TUNED, prompts, {"last": [Head(3, 0)]})
    with pytest.raises(InputError, match="no position 'nowhere'"):
        cmap(BASE, TUNED, prompts, {"nowhere": [Head(0, 0)]})
    unanswered = PromptBatch(
        prompts.tokens, prompts.answers - 30, prompts.positions, prompts.attention_mask
    )
    with pytest.raises(InputError, match="no answer"):
        cmap(BASE, TUNED, unanswered, HEADS)
    with pytest.raises(InputError, match=r"lacks blocks\.0\.attn\.hook_v"):
        input_hooks({}, BASE, prompts, HEADS, inputs="v")
    with pytest.raises(InputError, match="letters of q, k and v"):
        patch_inputs_from_model(TUNED, BASE, prompts, HEADS, inputs="z")


def test_half_an_edit_is_refused() -> None:
    prompts = random_prompts(3, 6)
    for inputs in ("k", "v"):
        noting, writing = patch_inputs_from_model(
            TUNED, BASE, prompts, {"last": [Head(1, 0)]}, inputs=inputs
        )
        with pytest.raises(InputError, match="run both"):
            answer_logits(BASE, prompts, [writing])
        with pytest.raises(InputError, match=r"makes no edit|has shape"):
            answer_logits(BASE, prompts, [(hook_point("pattern", 1), writing[1])])
        for batch in (prompts[:2], random_prompts(3, 5)):
            with pytest.raises(InputError, match="has shape"):
                answer_logits(BASE, batch, [noting, writing])
        # What is left of a run that failed does no harm to the next.
        answer_logits(BASE, prompts, [noting, writing])


def test_edits_ahead_of_what_is_recomputed_are_refused() -> None:
    prompts = random_prompts(3, 6, seed=1)
    hooks = patch_inputs_from_model(TUNED, BASE, prompts, {"early": [Head(1, 0)]}, inputs="k")
    run = CleanRun.record(BASE, prompts, first_layer=0, positions=["last"])
    with pytest.raises(InputError, match="record the run with the named position"):
        run.answer_logits(hooks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2}, r"differ in n_layers \(3 and 2\)"),
        ({"d_model": 32}, r"differ in d_model \(24 and 32\)"),
        ({"d_mlp": 64}, r"differ in d_mlp \(40 and 64\)"),
        ({"act_fn": "gelu"}, r"differ in act_fn \(silu and gelu\)"),
        ({"rotary_base": 5000}, r"differ in rotary_base \(10000"),
        ({"d_vocab": 21}, r"differ in d_vocab \(20 and 21\)"),
    ],
)
def test_models_of_another_make_are_refused(changes: dict, message: str) -> None:
    other = random_model(**{**SHAPE, **changes})
    with pytest.raises(InputError, match=message):
        cmap(BASE, other, random_prompts(2, 5), HEADS)


def test_scaled_rotary_embeddings_are_told_apart() -> None:
    other = copy.deepcopy(TUNED)
    other.blocks[1].attn.rotary_sin = other.blocks[1].attn.rotary_sin.roll(1, 0)
    with pytest.raises(InputError, match="rotary embedding of layer 1"):
        check_same_architecture(BASE, other)


def test_the_first_token_that_differs_is_named() -> None:
    words = [f"word{i}" for i in range(17)]
    one, same, swapped, other = (copy.deepcopy(BASE) for _ in range(4))
    one.tokenizer = word_tokenizer(words)
    same.tokenizer = word_tokenizer(words)
    swapped.tokenizer = word_tokenizer([*words[:5], words[6], words[5], *words[7:]])
    other.tokenizer = word_tokenizer([*words[:-1], "else"])
    check_same_architecture(one, same)
    check_same_architecture(one, BASE)
    with pytest.raises(InputError, match="'word5' is 8 in one and 9 in the other"):
        check_same_architecture(one, swapped)
    with pytest.raises(InputError, match="only the second knows 'else'"):
        check_same_architecture(one, other)


def test_a_token_that_fine_tuning_added_does_no_harm() -> None:
    words = [f"word{i}" for i in range(17)]
    base, larger = copy.deepcopy(BASE), random_model(**SHAPE, d_vocab=21, seed=1)
    base.tokenizer, larger.tokenizer = word_tokenizer(words), word_tokenizer(words)
    larger.tokenizer.add_tokens(["added"])
    prompts = random_prompts(4, 6)
    tokens = torch.where(prompts.mask, prompts.tokens, 20)
    padded = PromptBatch(tokens, prompts.answers, prompts.positions, prompts.attention_mask)
    # Padding with the token that only one of them has is no reading of it.
    for one, other in ((base, larger), (larger, base)):
        found = cmap(one, other, padded, HEADS)
        plain = cmap(one, other, prompts, HEADS)
        assert torch.equal(found.answer_log_probability, plain.answer_log_probability)
    tokens = prompts.tokens.clone()
    tokens[0, 0] = 20
    reading = PromptBatch(tokens, prompts.answers, prompts.positions, prompts.attention_mask)
    with pytest.raises(InputError, match="only one of the models knows"):
        cmap(larger, base, reading, HEADS)


def test_models_that_do_more_with_scores_are_refused() -> None:
    changes = {"attn_scores_soft_cap": 30.0}
    base, tuned = random_model(**SHAPE, **changes), random_model(**SHAPE, **changes, seed=1)
    prompts = random_prompts(2, 5)
    cmap(base, tuned, prompts, HEADS, patch="q", engine="hooks")
    with pytest.raises(InputError, match="Keys and values can't be patched"):
        cmap(base, tuned, prompts, HEADS, patch="k", engine="hooks")
    with pytest.raises(InputError, match='engine="hooks"'):
        cmap(base, tuned, prompts, HEADS)
