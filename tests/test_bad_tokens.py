"""Tokens that a model does not know, empty batches, numbers of the wrong kind: one sentence that
names the prompt and the token, whatever is called."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.all_methods import CALLS, ON_BRIDGE, PLAIN_RUNS
from tests.random_models import VOCABULARY, random_model, random_pairs, word_tokenizer
from tl_entity import (
    Head,
    InputError,
    MaskedForward,
    Metric,
    PairBatch,
    PromptBatch,
    cmap,
    evaluate,
    mean_head_outputs,
    path_patch,
)
from tl_entity.exact.suffix import CleanRun
from tl_entity.metrics import LOGIT_DIFFERENCE


def with_token(pairs: PairBatch, row: int, at: int, token: int) -> PairBatch:
    """The pairs with one token of a clean and of a corrupt prompt replaced."""

    def changed(prompts: PromptBatch) -> PromptBatch:
        tokens = prompts.tokens.clone()
        tokens[row, at] = token
        return replace(prompts, tokens=tokens)

    return replace(pairs, clean=changed(pairs.clean), corrupt=changed(pairs.corrupt))


@pytest.mark.parametrize("token", [VOCABULARY, 10**9, -3])
@pytest.mark.parametrize("name", CALLS)
def test_a_token_without_an_embedding(name: str, token: int) -> None:
    pairs = with_token(random_pairs(8), 5, 1, token)
    row = 0 if name == "attention_over_prompt" else 5
    if row == 0:
        pairs = pairs[5:]
    with pytest.raises(InputError, match=rf"prompt {row} has at 1 the token {token}, and the mod"):
        CALLS[name](random_model(), pairs)


@pytest.mark.parametrize("name", ON_BRIDGE)
def test_a_bridge_says_so_too(name: str, bridge: Any) -> None:
    pairs = with_token(random_pairs(8), 5, 1, 10**6)
    with pytest.raises(InputError, match=r"prompt (5|0) has at 1 the token 1000000"):
        ON_BRIDGE[name](bridge, pairs[5:] if name == "attention_over_prompt" else pairs)


@pytest.fixture(scope="module")
def bridge() -> Any:
    from tl_entity import load_model

    return load_model("default-base", backend="bridge", device="cpu")


@pytest.mark.parametrize("name", CALLS)
def test_padding_may_be_any_number(name: str) -> None:
    """It is masked, so that no embedding is needed for it, and changes nothing."""
    pairs, model = random_pairs(8), random_model()

    def padded_with(prompts: PromptBatch, token: int) -> PromptBatch:
        return replace(prompts, tokens=torch.where(prompts.mask, prompts.tokens, token))

    def of(token: int) -> Tensor:
        padded = [padded_with(prompts, token) for prompts in (pairs.clean, pairs.corrupt)]
        return CALLS[name](model, PairBatch(padded[0], padded[1], pairs.targets))

    wanted = of(1)
    for token in (-100, VOCABULARY + 7):
        found = of(token)
        if name == "mean_head_outputs":  # of a position that no prompt has a token at
            assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


ANSWERED = [name for name in CALLS if "evaluate" in name or name.startswith(("cmap", "knock"))]
ANSWERED += [name for name in CALLS if name.startswith(("completeness", "minimality"))]
OF_PAIRS = ("path", "discover", "learn", "activation", "carries")
OF_PAIRS += ("nodes", "gradient", "mechanism", "four", "weight")
TARGETED = [name for name in CALLS if name.startswith(OF_PAIRS)]


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_outside_the_vocabulary(name: str) -> None:
    pairs = random_pairs(8)
    pairs.clean.answers[3] = VOCABULARY
    with pytest.raises(InputError, match=r"answer of prompt 3 is the token 20.*vocabulary has 20"):
        CALLS[name](random_model(), pairs)
    pairs.clean.answers[3] = -1
    with pytest.raises(InputError, match="prompt 3 has no answer"):
        CALLS[name](random_model(), pairs)


@pytest.mark.parametrize("name", TARGETED)
def test_a_target_outside_the_vocabulary(name: str) -> None:
    pairs = random_pairs(8)
    pairs = replace(pairs, targets=pairs.targets.clone())
    pairs.targets[6] = VOCABULARY
    with pytest.raises(InputError, match="target of pair 6 is the token 20"):
        CALLS[name](random_model(), pairs)
    pairs.targets[6] = -100
    with pytest.raises(InputError, match="Pair 6 has no target: -100"):
        CALLS[name](random_model(), pairs)


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_that_is_not_needed_may_be_missing(name: str) -> None:
    pairs, model = random_pairs(8), random_model()
    if name in ANSWERED:
        return
    wanted = CALLS[name](model, pairs)
    none = replace(pairs.clean, answers=torch.full_like(pairs.clean.answers, -1))
    torch.testing.assert_close(CALLS[name](model, replace(pairs, clean=none)), wanted)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_an_answer_that_only_the_answering_model_knows(engine: Any) -> None:
    """As when fine-tuning, or its undoing, has cut the vocabulary down: the other is only read."""
    base, tuned = random_model(d_vocab=24), random_model(d_vocab=20)
    base.tokenizer = tuned.tokenizer = word_tokenizer([f"w{i}" for i in range(3, 20)])
    prompts = random_pairs(8).clean
    prompts.answers[2] = 22
    found = cmap(base, tuned, prompts, {"last": [Head(1, 0)]}, engine=engine)
    assert found.answer_log_probability.isfinite().all()
    with pytest.raises(InputError, match="answer of prompt 2 is the token 22"):
        cmap(tuned, base, prompts, {"last": [Head(1, 0)]}, engine=engine)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("foil", [VOCABULARY, -1])
def test_a_foil_outside_the_vocabulary(engine: str, foil: int) -> None:
    pairs = replace(random_pairs(), foils=torch.tensor([1, 2, foil, 3]))
    with pytest.raises(InputError, match=f"foil of pair 2 is the token {foil}"):
        path_patch(random_model(), pairs, metric=LOGIT_DIFFERENCE, engine=engine)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_a_token_that_a_metric_asks_for(engine: str) -> None:
    metric = Metric(
        "mine",
        lambda logits, pairs: logits[..., 0],
        tokens=lambda pairs: torch.full((len(pairs), 1), VOCABULARY + 1),
    )
    with pytest.raises(InputError, match="mine of pair 0 is the token 21"):
        path_patch(random_model(), random_pairs(), metric=metric, engine=engine)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_tokens_whose_logits_are_wanted(engine: str) -> None:
    model, pairs = random_model(), random_pairs()
    wanted = torch.tensor([[0], [1], [VOCABULARY], [2]])
    masked = MaskedForward(model, [Head(1, 0)], position="last", engine=engine)
    with pytest.raises(InputError, match="pair 2 is the token 20"):
        masked.run(pairs, masked.mask, tokens=wanted)
    run = CleanRun.record(model, pairs.clean, first_layer=0, positions=["last"])
    with pytest.raises(InputError, match="prompt 2 is the token 20"):
        run.answer_logits(tokens=wanted)


@pytest.mark.parametrize("name", CALLS)
def test_an_empty_batch(name: str) -> None:
    with pytest.raises(
        InputError, match=r"no (prompts|pairs): the batch|There is no prompt 0|0 pa"
    ):
        CALLS[name](random_model(), random_pairs(4)[:0])


def test_mean_outputs_of_plain_tokens() -> None:
    model = random_model()
    with pytest.raises(InputError, match="no prompts"):
        mean_head_outputs(model, torch.empty(0, 5, dtype=torch.long))
    with pytest.raises(InputError, match="prompt 1 has at 2 the token 99"):
        mean_head_outputs(model, torch.tensor([[1, 2, 3], [1, 2, 99]]))
    with pytest.raises(InputError, match="tokens of a batch are float32"):
        mean_head_outputs(model, torch.ones(2, 3))


def last(n: int) -> dict[str, Tensor]:
    return {"last": torch.full((n,), 2)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PromptBatch(torch.ones(2, 3), torch.ones(2).long(), last(2)), "tokens.*float32"),
        (lambda: PromptBatch(torch.ones(2, 3).bool(), torch.ones(2).long(), last(2)), "are bool"),
        (lambda: PromptBatch(torch.ones(2, 3).long(), torch.ones(2), last(2)), "answers.*float32"),
        (
            lambda: PromptBatch(
                torch.ones(2, 3).long(), torch.ones(2).long(), {"last": torch.ones(2) * 2}
            ),
            "'last'.*float32",
        ),
        (
            lambda: PromptBatch(
                torch.ones(2, 3).long(), torch.ones(2).long(), last(2), torch.ones(2, 3)
            ),
            "attention_mask.*float32",
        ),
        (lambda: replace(random_pairs(), targets=torch.ones(4)), "targets.*float32"),
        (lambda: replace(random_pairs(), foils=torch.ones(4).half()), "foils.*float16"),
    ],
)
def test_numbers_of_the_wrong_kind(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=f"The {said}" if said[0] != "a" or "_" in said else said):
        make()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_narrow_integers_are_the_same_tokens(dtype: torch.dtype) -> None:
    """An uint8 index means a mask to torch, and gather takes no int32."""
    model, prompts = random_model(), random_pairs().clean
    narrow = PromptBatch(
        prompts.tokens.to(dtype),
        prompts.answers.to(dtype),
        {name: index.to(dtype) for name, index in prompts.positions.items()},
        prompts.attention_mask.to(dtype),
    )
    wanted, found = evaluate(model, prompts), evaluate(model, narrow)
    assert torch.equal(wanted.answer_log_probability, found.answer_log_probability)
    assert torch.equal(wanted.correct, found.correct)


def test_all_plain_runs_are_called() -> None:
    assert set(PLAIN_RUNS) <= set(CALLS)
