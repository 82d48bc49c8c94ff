"""A model whose path patching scores can be worked out on paper."""

import math

import pytest
import torch
from transformer_lens import HookedTransformer

from tests.random_models import random_model
from tl_entity import Head, PairBatch, PromptBatch, path_patch


def paper_model() -> HookedTransformer:
    """Two layers of two heads that share one key and one value vector; the MLPs are silent.

    Of the 16 coordinates of the residual stream, 0-3 say which token this is: token t is 4 e_t.
    L0H0 copies the token to coordinates 4-7; L0H1 writes nothing. L1H0 copies coordinates 4-7 to
    8-11 and L1H1 to 12-15. The logit of token t is log 2 times (2 r[4+t] + r[8+t] + r[12+t]) / 4,
    where r is the final residual stream.
    """
    model = random_model(
        n_layers=2, n_heads=2, n_kv_heads=1, d_head=4, d_model=16, d_vocab=4, d_mlp=4, eps=0.0
    )
    for name, parameter in model.named_parameters():
        parameter.data = torch.ones_like(parameter) if "ln" in name else 0 * parameter
    one = torch.eye(4, dtype=torch.float64)
    model.embed.W_E.data[:, :4] = 4 * one  # root mean square 1: the first norm changes nothing
    first, second = model.blocks[0].attn, model.blocks[1].attn
    first._W_V.data[0, :4] = one
    first.W_O.data[0, :, 4:8] = one
    # Before layer 1 two coordinates are 4: root mean square sqrt(2), undone here.
    second._W_V.data[0, 4:8] = math.sqrt(2) * one
    second.W_O.data[0, :, 8:12] = one
    second.W_O.data[1, :, 12:16] = one
    # In the end four coordinates are 4: root mean square 2.
    model.unembed.W_U.data[4:8] = 2 * 2 * math.log(2) / 4 * one
    model.unembed.W_U.data[8:12] = 2 * math.log(2) / 4 * one
    model.unembed.W_U.data[12:16] = 2 * math.log(2) / 4 * one
    return model


def single_token(token: int) -> PromptBatch:
    return PromptBatch(
        torch.tensor([[token]]), torch.tensor([token]), {"last": torch.zeros(1, dtype=torch.long)}
    )


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize(
    ("receivers", "receiver_input", "expected"),
    [
        (None, None, -21 / 40),
        ([Head(1, 0)], "v", -5 / 24),
        ([Head(1, 1)], "v", -5 / 24),
        ([Head(1, 0), Head(1, 1)], "v", -21 / 40),
        ([Head(1, 0)], "q", 0.0),
        ([Head(1, 0)], "k", 0.0),
    ],
)
def test_scores_are_those_worked_out_on_paper(
    engine: str, receivers: list[Head] | None, receiver_input: str | None, expected: float
) -> None:
    """The clean prompt is token 0 alone, the corrupt one token 1 alone; the target is token 0.

    Clean: r = 4 in coordinates 0, 4, 8, 12, so token 0 has weight 2^(2+1+1) = 16 and the three
    others 1: P = 16/19.

    L0H0 into the logits: coordinate 4 moves to 5, layer 1's heads are held. Token 0 keeps 2^(1+1),
    token 1 gets 2^2: P = 4/(4+4+1+1) = 2/5, and (2/5 - 16/19) / (16/19) = -21/40.

    L0H0 into the values of L1H0: in the second run only coordinate 8 moves to 9. Weights
    2^(2+1) = 8 and 2^1: P = 8/(8+2+1+1) = 2/3, score -5/24; the same for L1H1, whose value vector
    is shared, but replaced for it alone. Into both: weights 2^2 and 2^(1+1), P = 2/5, score -21/40.

    A single token only attends to itself: queries and keys change nothing.
    """
    scores = path_patch(
        paper_model(),
        PairBatch(single_token(0), single_token(1), torch.tensor([0])),
        receivers=receivers,
        receiver_input=receiver_input,
        engine=engine,
    )
    assert scores.clean_values.item() == pytest.approx(math.log(16 / 19), abs=1e-12)
    assert scores.scores[0, 0].item() == pytest.approx(expected, abs=1e-12)
    assert scores.scores[0, 1].item() == pytest.approx(0, abs=1e-12)
    # L1H0 into the logits: coordinate 8 moves to 9, as above.
    into_logits = -5 / 24 if receivers is None else 0.0
    assert scores.scores[1].tolist() == pytest.approx([into_logits] * 2, abs=1e-12)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_a_change_at_an_earlier_token_is_felt_through_attention(engine: str) -> None:
    """Two tokens, uniform attention: the receiver's values at `first` reach the last token.

    Clean 0 2, corrupt 1 2, L0H0 into the values of L1H0 at `first`. There coordinates 0 and 4 are 4
    and the value is 4 e_0; with L0H0 corrupt it is 4 e_1. The last token reads half of it and half
    of its own value v, so its z moves by (4 e_1 - 4 e_0) / 2, from 2 + v_0 to v_0 in coordinate 8.

    At the last token L0H0 writes 2 e_0 + 2 e_2 to coordinates 4-7: the squares 16, 4, 4 of 16
    coordinates, root mean square sqrt(3/2), v = sqrt(2) 2 / sqrt(3/2) (e_0 + e_2) = c (e_0 + e_2)
    with c = 4/sqrt(3). So z of both layer 1 heads is (2 + c/2) e_0 + (c/2) e_2; the
    sibling L1H1 keeps it.
    """
    pairs = PairBatch(*(two_tokens(first) for first in (0, 1)), torch.tensor([0]))
    scores = path_patch(
        paper_model(),
        pairs,
        position="first",
        receivers=[Head(1, 0)],
        receiver_input="v",
        engine=engine,
    )
    c = 4 / math.sqrt(3)
    sibling = [2 + c / 2, 0, c / 2, 0]

    def probability(z: list[float]) -> float:
        squares = 16 + 4 + 4 + sum(x**2 for x in (*z, *sibling))
        # The unembedding expects a root mean square of 2.
        scale = 2 / math.sqrt(squares / 16) / 4
        direct = [4, 0, 4, 0]
        weights = [2 ** (scale * (d + x + y)) for d, x, y in zip(direct, z, sibling, strict=True)]
        return weights[0] / sum(weights)

    before, after = probability(sibling), probability([c / 2, 2, c / 2, 0])
    assert scores.scores[0, 0].item() == pytest.approx(after / before - 1, abs=1e-12)
    assert after / before < 0.9
    assert torch.equal(scores.scores[1], torch.zeros(2, dtype=torch.float64))


def two_tokens(first: int) -> PromptBatch:
    return PromptBatch(
        torch.tensor([[first, 2]]),
        torch.tensor([0]),
        {"last": torch.tensor([1]), "first": torch.tensor([0])},
    )
