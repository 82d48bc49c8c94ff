"""Tables of what two models answer, counted by hand."""

import pytest
import torch

from tests.random_models import random_model
from tests.test_results import same
from tl_entity import InputError, compare_behaviour, load_model
from tl_entity.methods.behaviour import ANSWER_KINDS, Behaviour, kind_of_answer
from tl_entity.stats import paired_difference_interval, wilson_interval
from tl_entity.tasks.boxes import BoxPrompt, sample_prompts

PROMPT = BoxPrompt(("apple", "bell", "map"), ("E", "Q", "A"), "Q")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("bell", "form of the answer"),
        (" Bell", "form of the answer"),
        (" be", "form of the answer"),
        (" apple", "another object"),
        ("Map", "another object"),
        (" app", "another object"),
        (" Q", "label"),
        ("A", "label"),
        (" a", "another object"),
        (" cup", "other"),
        (" Z", "other"),
        (" bells", "other"),
        ("\n", "other"),
        (".", "other"),
    ],
)
def test_kinds_of_answers(text: str, kind: str) -> None:
    assert kind_of_answer(text, False, PROMPT) == kind
    assert kind_of_answer(text, True, PROMPT) == "right"


@pytest.fixture(scope="module")
def models():
    return [load_model(f"default-{name}", device="cpu") for name in ("base", "tuned")]


PROMPTS = sample_prompts(60, n_boxes=7, seed=1) + sample_prompts(40, n_boxes=3, seed=2)


@pytest.fixture(scope="module")
def found(models) -> Behaviour:
    return compare_behaviour(*models, PROMPTS)


def answers(model) -> list[str]:
    """Each prompt by itself, straight from the model."""
    texts = [model.to_tokens(prompt.text) for prompt in PROMPTS]
    return [model.tokenizer.decode([int(model(tokens)[0, -1].argmax())]) for tokens in texts]


def test_the_table_counts_what_the_models_answer(models, found: Behaviour) -> None:
    said = [answers(model) for model in models]
    right = [
        torch.tensor([s.strip() == p.answer for s, p in zip(some, PROMPTS, strict=True)]).numpy()
        for some in said
    ]
    for key, groups in (
        (lambda prompt: len(prompt.labels), found.by_boxes()),
        (lambda prompt: prompt.labels.index(prompt.query_label), found.by_index()),
    ):
        keys = [key(prompt) for prompt in PROMPTS]
        assert list(groups) == sorted(set(keys))
        for value, compared in groups.items():
            rows = [i for i, k in enumerate(keys) if k == value]
            base, tuned = (some[rows] for some in right)
            assert compared.n_prompts == len(rows)
            assert compared.base == base.mean() and compared.tuned == tuned.mean()
            assert compared.base_interval == wilson_interval(int(base.sum()), len(rows))
            assert compared.difference == pytest.approx(tuned.mean() - base.mean())
            assert compared.difference_interval == paired_difference_interval(tuned, base)
    kinds = found.by_answer()
    assert list(kinds) == list(ANSWER_KINDS)
    for which, some in zip(("base", "tuned"), said, strict=True):
        others = [
            s.strip() != p.answer and s.strip() in p.objects
            for s, p in zip(some, PROMPTS, strict=True)
        ]
        assert getattr(kinds["another object"], which) == sum(others) / len(PROMPTS)
        assert sum(getattr(compared, which) for compared in kinds.values()) == pytest.approx(1)
    assert kinds["right"].tuned > kinds["right"].base
    assert kinds["another object"].base > 0.05


def test_behaviour_comes_back_and_shows_itself(found: Behaviour, tmp_path) -> None:
    found.save(tmp_path / "behaviour")
    assert same(Behaviour.load(tmp_path / "behaviour"), found)
    assert "\n" not in repr(found) and 20 < len(str(found)) < 200
    rows = found.to_dataframe().set_index(["by", "value"])
    assert rows.loc[("boxes", "3"), "n_prompts"] == 40
    assert rows.loc[("answer", "right"), "tuned"] == found.tuned.accuracy
    bars = {trace.name: trace for trace in found.plot(by="boxes").data}
    assert list(bars["tuned"].y) == [c.tuned for c in found.by_boxes().values()]
    with pytest.raises(InputError, match="not by 'colour'"):
        found.plot(by="colour")


def test_what_cannot_be_compared_is_refused(models) -> None:
    with pytest.raises(InputError, match="no prompts"):
        compare_behaviour(*models, [])
    with pytest.raises(InputError, match="mentioned 0 times"):
        compare_behaviour(*models, [BoxPrompt(("apple",), ("E",), "Q")])
    untold = random_model()
    with pytest.raises(InputError, match="no tokenizer"):
        compare_behaviour(untold, untold, [PROMPT])
    with pytest.raises(InputError, match="n_layers"):
        compare_behaviour(models[0], untold, [PROMPT])
