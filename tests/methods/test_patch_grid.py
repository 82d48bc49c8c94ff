"""Patching at every layer and token: both engines, whole-prompt identities, names of places."""

from dataclasses import replace

import pytest
import torch

from tests.random_models import random_model, random_pairs, random_prompts
from tl_entity import (
    InputError,
    PairBatch,
    discovery_pairs,
    load_model,
    logit_lens,
    patch_grid,
)
from tl_entity.metrics import LOG_PROBABILITY

OVER = ("resid_pre", "attn_out", "mlp_out", "z")


def even_pairs(n: int = 4, n_tokens: int = 7, *, left: bool = False) -> PairBatch:
    """Pairs of prompts of one length, padded to a longer one."""
    pairs = random_pairs(n, n_tokens, seed=3, left=left)
    length = n_tokens - 2
    ends = torch.full((n,), n_tokens - 1 if left else length - 1)

    def cut(width: int, seed: int):
        some = random_prompts(n, width, seed=seed)
        mask = torch.zeros(n, width, dtype=torch.long)
        mask[:, width - length if left else 0 : width if left else length] = 1
        last = ends - (n_tokens - width if left else 0)
        positions = {"last": last, "place": last - 1, "early": last - length + 1}
        return replace(some, positions=positions, attention_mask=mask)

    return PairBatch(cut(n_tokens, 5), cut(n_tokens - 1, 6), pairs.targets, pairs.targets.flip(0))


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("into", ["clean", "corrupt"])
@pytest.mark.parametrize("over", OVER)
def test_engines_agree_at_every_token(over: str, into: str, left: bool) -> None:
    model, pairs = random_model(n_kv_heads=2), even_pairs(left=left)
    exact, hooks = (
        patch_grid(model, pairs, over, into=into, engine=engine) for engine in ("exact", "hooks")
    )
    torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-9, rtol=1e-9)
    assert exact.axes == hooks.axes and list(exact.axes)[-1] == "token"
    assert exact.per_example.shape[-2] == 5 and exact.per_example.abs().max() > 1e-3


@pytest.mark.parametrize("over", OVER)
def test_a_prompt_patched_with_itself_changes_exactly_nothing(over: str) -> None:
    clean = even_pairs().clean
    scores = patch_grid(random_model(), PairBatch(clean, clean, clean.answers), over)
    assert torch.equal(scores.per_example, torch.zeros_like(scores.per_example))


def test_chunks_do_not_matter() -> None:
    model, pairs = random_model(n_kv_heads=2), even_pairs(5)
    whole = patch_grid(model, pairs, "z").per_example
    for chunked in ({"batch_size": 2}, {"memory": 1}):
        parts = patch_grid(model, pairs, "z", **chunked).per_example
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


def test_the_stream_of_the_last_token_ahead_of_the_last_layer_is_all_but_attention() -> None:
    """In a model of one layer whose attention writes nothing, the last token's stream is all that
    the answer rests on, and no other token matters."""
    model, pairs = random_model(1), even_pairs()
    model.blocks[0].attn.W_O.data.zero_()
    model.blocks[0].attn.b_O.data.zero_()
    scores = patch_grid(model, pairs, metric=LOG_PROBABILITY).per_example[0]
    assert torch.equal(scores[:-1], torch.zeros_like(scores[:-1]))
    whole = [
        logit_lens(model, PairBatch(some, some, pairs.targets)).per_example[-1]
        for some in (pairs.clean, pairs.corrupt)
    ]
    torch.testing.assert_close(scores[-1], whole[1] - whole[0])


def test_the_only_head_of_a_layer_is_its_attention() -> None:
    model, pairs = random_model(n_heads=1), even_pairs()
    head, attention = (patch_grid(model, pairs, over) for over in ("z", "attn_out"))
    assert list(head.axes) == ["layer", "head", "token"]
    torch.testing.assert_close(head.per_example[:, 0], attention.per_example)


def test_words_of_the_prompts_name_the_tokens() -> None:
    model = load_model("default-base")
    pairs = discovery_pairs(model.tokenizer, 3, n_boxes=2, seed=0)
    scores = patch_grid(model, pairs, "mlp_out")
    names = scores.axes["token"]
    assert len(names) == pairs.clean.tokens.shape[1]
    assert any(name.endswith("contains") for name in names)
    assert any(name.endswith("(object)") for name in names)
    assert "last" in patch_grid(model, pairs, tokens=["last"]).axes["token"]
    frame = scores.to_dataframe()
    assert len(frame) == model.cfg.n_layers * len(names)
    assert scores.plot().data


def test_a_part_of_three_axes_is_drawn() -> None:
    scores = patch_grid(random_model(), even_pairs(), "z")
    part = scores.at(head=2)
    assert list(part.axes) == ["layer", "token"]
    assert torch.equal(part.per_example, scores.per_example[:, 2])
    assert part.plot().data
    with pytest.raises(InputError, match="has two axes"):
        scores.plot()
    with pytest.raises(InputError, match="no axis 'row'"):
        scores.at(row=0)
    with pytest.raises(InputError, match="'head' has no 9"):
        scores.at(head=9)


def test_bad_questions_are_refused() -> None:
    model, pairs = random_model(), random_pairs()
    with pytest.raises(InputError, match="name some positions"):
        patch_grid(model, pairs)
    with pytest.raises(InputError, match="no position 'nowhere'"):
        patch_grid(model, pairs, tokens=["nowhere"])
    with pytest.raises(InputError, match="once"):
        patch_grid(model, pairs, tokens=["last", "last"])
    with pytest.raises(InputError, match="over"):
        patch_grid(model, pairs, "resid_post")
