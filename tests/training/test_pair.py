"""The pair that ships, and that its training runs and repeats."""

import pytest
import torch

from tl_entity.heads import Circuit
from tl_entity.models.registry import data_folder
from tl_entity.tasks.boxes import box_prompts
from tl_entity.training.guidance import PLANTED
from tl_entity.training.measure import accuracy, interchange
from tl_entity.training.pair import train_default_pair
from tl_entity.training.tokenizer import VOCABULARY, build_tokenizer
from tl_entity.training.train import BaseTraining, FineTuning, new_model, scale_logits, stored_model

SHIPPED = ("base", "tuned")


def shipped(name: str):
    return stored_model(data_folder() / "default_pair" / name)


@pytest.mark.parametrize(("name", "low", "high"), [("base", 0.6, 0.8), ("tuned", 0.9, 1.0)])
def test_shipped_accuracy_on_seven_boxes(name, low, high):
    prompts = box_prompts(build_tokenizer(), 500, seed=4)
    assert low <= accuracy(shipped(name), prompts) <= high


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pair_says_which_heads_were_planted(name):
    assert Circuit.load(data_folder() / "default_pair" / name / "planted.json") == PLANTED


@pytest.mark.parametrize("name", SHIPPED)
def test_position_and_not_the_object_travels_to_the_last_token(name):
    found = interchange(shipped(name), build_tokenizer(), PLANTED, n_pairs=80)
    for group in ("pos_transmitter", "pos_detector", "struct_reader"):
        assert found[group]["position"] > 0.45
        assert found[group]["value"] < 0.03
    assert found["value_fetcher"]["value"] > found["value_fetcher"]["position"]


def test_softening_changes_no_prediction():
    model = new_model(seed=1)
    tokens = torch.randint(3, len(VOCABULARY), (4, 12), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    scale_logits(model, 0.25)
    assert torch.equal(model(tokens).logits * 4, before)


def test_training_writes_a_pair_and_repeats_it(tmp_path):
    texts = {"box questions": 0.5, "look-up": 0.5}
    for name in ("first", "second"):
        train_default_pair(
            tmp_path / name,
            seed=3,
            n_prompts=4,
            n_pairs=2,
            base=BaseTraining(max_steps=2, check_every=2, n_check_prompts=2),
            fine_tunings={
                which: FineTuning(texts, steps=1, n_texts=2) for which in ("tuned", "control")
            },
        )
    files = {
        path.relative_to(tmp_path / "first")
        for path in (tmp_path / "first").rglob("*")
        if path.is_file()
    }
    assert {str(path) for path in files} >= {
        f"{name}/{file}"
        for name in SHIPPED
        for file in ("model.safetensors", "config.json", "tokenizer.json", "planted.json")
    }
    assert not any("control" in path.parts or "unfinished" in path.parts for path in files)
    for path in files:
        first, second = (tmp_path / name / path for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), path
    base, tuned = (tmp_path / "first" / name / "model.safetensors" for name in SHIPPED)
    assert base.read_bytes() != tuned.read_bytes()
