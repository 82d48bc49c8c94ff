"""A wrong type is told in a sentence, and what stands for a head, node or metric is read as one."""

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Int
from torch import Tensor

import tl_entity
import tl_entity.hooks as hooks
from tests.random_models import random_model, random_pairs
from tests.with_roles import role_pairs
from tl_entity import (
    Circuit,
    Head,
    InputError,
    Node,
    PromptBatch,
    cmap,
    discover_circuit,
    evaluate,
    learn_mask,
    load_model,
    path_patch,
    pooled_ablation,
    zero_ablation,
)
from tl_entity._typing import checked
from tl_entity._words import described, wanted
from tl_entity.heads import as_head, as_node
from tl_entity.metrics import LOG_PROBABILITY, TARGET_LOGIT, Metric, as_metric

MODEL = random_model()
PAIRS = random_pairs()

UNCHECKED = (
    # Nothing is required, or a model twice, which the test gives it.
    *("zero_ablation", "check_same_architecture"),
    # Called for every layer of every run, or entered as a context.
    *("hook_point", "kv_head", "n_kv_heads", "must_fire", "separate_kv_heads"),
)

FUNCTIONS = {
    name: getattr(room, name)
    for room, names in ((tl_entity, tl_entity.__all__), (hooks, hooks.__all__))
    for name in names
    if inspect.isfunction(getattr(room, name)) and name not in UNCHECKED
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [MODEL, PAIRS, object(), [3.5] * 5000, torch.zeros(99, 99)])
def test_every_function_tells_a_wrong_type_in_a_sentence(name, given) -> None:
    function = FUNCTIONS[name]
    required = {
        key: given
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    }
    assert required, name
    with pytest.raises(InputError) as caught:
        function(**required)
    told = str(caught.value)
    assert len(told.splitlines()) <= 3 and len(told) < 300, told
    if isinstance(caught.value, TypeError):
        shown = "".join(traceback.format_exception(caught.value))
        assert len(shown) < 4000 and "During handling" not in shown


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: evaluate(PAIRS.clean, MODEL),
            "evaluate: 'model' must be a HookedTransformer or a TransformerBridge, not a "
            "PromptBatch.",
        ),
        (
            lambda: evaluate(MODEL, "The apple is in Box E"),
            "evaluate: 'prompts' must be a PromptBatch or a PairBatch, not the text "
            "'The apple is in Box E'.",
        ),
        (
            lambda: path_patch(MODEL, PAIRS, engine="fast"),
            "Runner: 'engine' must be 'exact' or 'hooks', not the text 'fast'.",
        ),
        (
            lambda: path_patch(MODEL, PAIRS, receivers=[3, 4.0]),
            "path_patch: 'receivers' must be a list of Head (like L10H3 or (10, 3)), a dict from "
            "'q', 'k' or 'v' to list of Head (like L10H3 or (10, 3)), or None, not a list of 2 "
            "(int, float).",
        ),
        (
            lambda: PromptBatch(PAIRS.clean.tokens, PAIRS.clean.answers[:2]),
            "PromptBatch: 'answers' must be a tensor of numbers, [batch], where batch=4, not a "
            "Tensor of int64 of shape (2,).",
        ),
        (
            lambda: evaluate(MODEL, PAIRS.clean, keep=[(0, 1)], ablation=zero_ablation()),
            "evaluate: 'keep' must be a Circuit, a dict from texts to list of Head (like L10H3 or "
            "(10, 3)), or None, not a list of 1 (tuple).",
        ),
    ],
)
def test_the_sentence_says_what_it_is_and_what_is_wanted(call, told) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == told
    assert isinstance(caught.value, TypeError)


def test_values_and_types_in_words() -> None:
    assert described(MODEL) == "a HookedTransformer"
    assert described(HookedTransformer := type(MODEL)) == f"the class {HookedTransformer.__name__}"
    assert described(np.zeros((2, 3))) == "a ndarray of float64 of shape (2, 3)"
    assert described("x" * 90) == f"the text '{'x' * 40}…'"
    assert described(None) == "None" and described(len) == "the function len"
    assert described({"a": 1}) == "a dict of 1 (str)" and described(()) == "a tuple of 0"
    assert wanted(Mapping[str, int] | None) == "a dict from texts to whole numbers, or None"
    assert wanted(Literal["a"]) == "'a'" and wanted(Callable[[int], str]) == "a function"
    assert wanted(Sequence[Sequence[Node]]) == (
        "a list of list of Node (like L10H3@label or MLP10@label)"
    )
    assert wanted(Int[Tensor, "batch pos"]) == "a tensor of whole numbers, [batch pos]"


def test_errors_of_the_function_itself_pass_unchanged() -> None:
    @checked
    def fails(x: int) -> int:
        raise KeyError(x)

    with pytest.raises(KeyError):
        fails(3)

    @checked
    def lies(x: int) -> int:
        return "three"  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"result of .*lies"):
        lies(3)


@pytest.mark.parametrize("written", [Head(1, 2), (1, 2), [1, 2], "L1H2", (np.int64(1), 2)])
def test_heads_are_read_from_what_people_write(written) -> None:
    assert as_head(written) == Head(1, 2) and type(as_head(written)) is Head
    how: dict[str, Any] = {"receiver_input": "v"}
    expected = path_patch(MODEL, PAIRS, receivers=[Head(1, 2)], **how)
    for receivers in ([written], (written,), written):
        found = path_patch(MODEL, PAIRS, receivers=receivers, **how)
        assert torch.equal(found.scores, expected.scores) and found.receivers == (Head(1, 2),)
    for heads in ({"last": [written]}, {"last": written}, {"last": {as_head(written)}}):
        found = cmap(MODEL, random_model(seed=1), PAIRS.clean, heads)
        other = cmap(MODEL, random_model(seed=1), PAIRS.clean, {"last": [Head(1, 2)]})
        assert torch.equal(found.answer_log_probability, other.answer_log_probability)
    circuit = Circuit.entity_tracking(value_fetcher=[written])
    assert circuit.value_fetcher == (Head(1, 2),)
    mask = learn_mask(MODEL, PAIRS, [written], position="last", epochs=1)
    assert mask.heads == (Head(1, 2),)


@pytest.mark.parametrize("written", ["L1", (1,), (1, 2, 3), 5, (1.0, 2), None, Node(1, 2, "a")])
def test_what_is_no_head_is_refused_with_how_to_write_one(written) -> None:
    with pytest.raises(InputError, match="L10H3"):
        as_head(written)
    with pytest.raises(InputError, match=r"Head|L10H3"):
        evaluate(MODEL, PAIRS.clean, remove={"last": [written]}, ablation=zero_ablation())


def test_nodes_are_read_too() -> None:
    assert as_node("MLP1@even") == as_node((1, None, "even")) == Node(1, None, "even")
    with pytest.raises(InputError, match="L10H3@label"):
        as_node((1, 2))
    pairs = role_pairs()
    ablation = pooled_ablation(MODEL, pairs.corrupt)
    by_name = evaluate(MODEL, pairs.clean, remove={"even": ["L0H1"]}, ablation=ablation)
    by_head = evaluate(MODEL, pairs.clean, remove={"even": [Head(0, 1)]}, ablation=ablation)
    assert torch.equal(by_name.answer_log_probability, by_head.answer_log_probability)


@pytest.mark.parametrize("written", ["log probability", "LOG_PROBABILITY", "log-probability"])
def test_metrics_are_read_by_name(written) -> None:
    assert as_metric(written) is LOG_PROBABILITY
    found = path_patch(MODEL, PAIRS, metric=written)
    assert torch.equal(found.scores, path_patch(MODEL, PAIRS, metric=LOG_PROBABILITY).scores)


def test_a_function_of_logits_is_a_metric() -> None:
    def of_target(logits: Tensor, pairs: Any) -> Tensor:
        return Metric("own", TARGET_LOGIT.of_logits).of_logits(logits, pairs)

    found = path_patch(MODEL, PAIRS, metric=of_target)
    torch.testing.assert_close(found.scores, path_patch(MODEL, PAIRS, metric=TARGET_LOGIT).scores)
    assert found.metric == "of_target"
    plain = path_patch(MODEL, PAIRS, metric=lambda logits, k=7: logits[..., k], engine="hooks")
    exact = path_patch(MODEL, PAIRS, metric=lambda logits: logits[..., 7])
    torch.testing.assert_close(plain.scores, exact.scores)
    with pytest.raises(
        InputError, match=r"'metric' must be a Metric .or its name, .*, not a Hooked"
    ):
        path_patch(MODEL, PAIRS, metric=MODEL)
    with pytest.raises(InputError, match="the number 3 is no metric"):
        as_metric(3)
    with pytest.raises(InputError, match="No metric is called 'loss'; they are relative"):
        path_patch(MODEL, PAIRS, metric="loss")


def test_stages_and_models_of_the_wrong_type() -> None:
    with pytest.raises(InputError, match="discover_circuit: 'sizes' must be a dict from texts"):
        discover_circuit(MODEL, PAIRS, sizes=[2, 2])
    with pytest.raises(InputError, match="load_model: 'dtype' must be"):
        load_model("default-base", dtype=32)
