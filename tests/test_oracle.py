"""Path patching on both engines against a forward that shares no code with them."""

import itertools
from functools import lru_cache

import pytest
import torch

from tests.independent import Forward
from tests.random_models import random_model
from tl_entity import Head, PairBatch, PromptBatch, path_patch

PAIRS = [
    # clean tokens, corrupt tokens, target, senders' position in each
    ([3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5], 8, 3, 1),
    ([2, 7, 1, 8, 2], [8, 4, 5, 9, 0, 4], 3, 4, 5),
    ([1, 6, 1, 8, 0, 3], [3, 9, 8, 8, 7], 9, 0, 2),
]


def padded(rows: list[list[int]], answers: list[int], at: list[int], left: bool) -> PromptBatch:
    width = max(map(len, rows))
    tokens, mask, shift = [], [], []
    for row in rows:
        pad = [0] * (width - len(row))
        shift.append(len(pad) if left else 0)
        tokens.append(pad + row if left else row + pad)
        there = [1] * len(row)
        mask.append(pad + there if left else there + pad)
    start = torch.tensor(shift)
    return PromptBatch(
        tokens=torch.tensor(tokens),
        answers=torch.tensor(answers),
        positions={
            "place": start + torch.tensor(at),
            "last": start + torch.tensor([len(row) - 1 for row in rows]),
        },
        attention_mask=torch.tensor(mask),
    )


def pair_batch(left: bool) -> PairBatch:
    clean, corrupt, targets, at, corrupt_at = (list(column) for column in zip(*PAIRS, strict=True))
    return PairBatch(
        padded(clean, targets, at, left),
        padded(corrupt, targets, corrupt_at, left),
        torch.tensor(targets),
    )


@lru_cache
def expected_scores(
    n_kv_heads: int, receivers: tuple[tuple[int, int], ...] | None, receiver_input: str | None
) -> torch.Tensor:
    """What the definition gives, [layer head batch]; the same for either engine and padding."""
    forward = Forward(random_model(n_kv_heads=n_kv_heads))
    scores = torch.empty(3, 4, len(PAIRS), dtype=torch.float64)
    for layer, head in itertools.product(range(3), range(4)):
        for row, (clean, corrupt, target, at, corrupt_at) in enumerate(PAIRS):
            scores[layer, head, row] = forward.path_patch(
                torch.tensor(clean),
                torch.tensor(corrupt),
                target,
                (layer, head),
                at,
                corrupt_at,
                receivers,
                receiver_input,
            )
    return scores


@pytest.mark.parametrize("engine", ["hooks", "exact"])
@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize(
    ("n_kv_heads", "receivers", "receiver_input"),
    [
        (4, None, None),
        (2, ((2, 1),), "q"),
        (2, ((1, 0), (2, 3)), "q"),
        (4, ((1, 2), (2, 0)), "k"),
        (2, ((1, 2), (2, 0)), "k"),
        (4, ((2, 2),), "v"),
        (2, ((2, 2),), "v"),
        (1, ((1, 1), (1, 2), (2, 3)), "v"),
    ],
)
def test_scores_are_those_of_the_definition(
    engine: str, left: bool, n_kv_heads: int, receivers: tuple | None, receiver_input: str | None
) -> None:
    scores = path_patch(
        random_model(n_kv_heads=n_kv_heads),
        pair_batch(left),
        position="place",
        receivers=None if receivers is None else [Head(*r) for r in receivers],
        receiver_input=receiver_input,
        engine=engine,
    )
    expected = expected_scores(n_kv_heads, receivers, receiver_input)
    assert expected.abs().max() > 1e-3  # otherwise nothing was patched: no proof of anything
    # TransformerLens's rotary tables are float32 whatever the dtype.
    torch.testing.assert_close(scores.per_example, expected, atol=1e-6, rtol=0)


def test_the_forward_itself_is_the_models() -> None:
    model = random_model(n_kv_heads=2)
    tokens = torch.tensor(PAIRS[0][0])
    ours, _, _ = Forward(model).run(tokens)
    torch.testing.assert_close(ours, model(tokens[None])[0].log_softmax(-1), atol=1e-6, rtol=0)
