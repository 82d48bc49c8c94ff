"""The gain as an experiment of a study: what the library's calls give, kept step by step."""

import json
from dataclasses import replace
from importlib import resources

import pandas as pd
import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from tests.study.helpers import save_tiny_model
from tests.study.test_killed import files
from tests.study.test_reproduce import Watch
from tl_entity import (
    box_prompts,
    evaluate,
    four_corners,
    graft,
    load_model,
    weight_shares,
)
from tl_entity.errors import InputError
from tl_entity.methods.weight_units import Unit
from tl_entity.study.folder import STUDY
from tl_entity.study.gain_figures import gain_figures
from tl_entity.study.reproduce import reproduce
from tl_entity.study.results import Study
from tl_entity.study.settings import Settings, experiments_for


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return Settings(
        base=str(save_tiny_model(folder / "base", seed=1)),
        tuned=str(save_tiny_model(folder / "tuned", seed=2)),
        prompts=10,
        boxes=3,
        gain_prompts=6,
        only=("gain",),
        png=False,
        seed=3,
    )


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    out, watch = tmp_path_factory.mktemp("out") / "study", Watch()
    reproduce(settings, out, progress=watch)
    return out, watch


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def models(settings):
    return load_model(settings.base), load_model(settings.tuned)


@pytest.fixture(scope="module")
def held_out(models, results):
    seed = results["seeds"]["faithfulness"]
    return box_prompts(models[0].tokenizer, 10, n_boxes=3, seed=seed)


def test_shares_are_those_of_weight_shares(models, results):
    prompts = box_prompts(models[0].tokenizer, 6, n_boxes=3, seed=results["seeds"]["gain"])
    shares, record = weight_shares(*models, prompts), results["gain"]
    assert record["gain"] == pytest.approx(shares.gain, abs=1e-4)
    assert record["sum_of_shares"] == pytest.approx(shares.total, abs=1e-4)
    assert [found["unit"] for found in record["top"][:5]] == [str(u) for u in shares.top(5)]
    # The gain itself, from nothing but answers.
    whole = [evaluate(model, prompts, engine="hooks").answer_log_probability for model in models]
    assert record["gain"] == pytest.approx(float((whole[1] - whole[0]).mean()), abs=1e-4)
    kinds = record["by_kind"].values()
    assert sum(kind["share"] for kind in kinds) == pytest.approx(shares.total, abs=1e-4)
    assert sum(kind["n_units"] for kind in kinds) == record["n_units"] == len(shares.units)


def test_grafts_answer_prompts_that_the_shares_are_not_from(models, results, held_out):
    base, tuned = models
    record = results["gain"]["grafts"]
    assert record["base"]["correct"] == int(evaluate(base, held_out).correct.sum())
    entries = [e for e in record["entries"] if e["order"] == "share of the gain"]
    largest = entries[-1]
    assert largest["n_units"] == round(results["gain"]["n_units"] / 2)
    seed = results["seeds"]["gain"]
    shares = weight_shares(*models, box_prompts(base.tokenizer, 6, n_boxes=3, seed=seed))
    units: tuple[Unit, ...] = shares.top(largest["n_units"])
    found = evaluate(graft(base, tuned, units), held_out, engine="hooks")
    assert largest["alone"]["correct"] == int(found.correct.sum())
    without = evaluate(graft(tuned, base, units), held_out, engine="hooks")
    assert largest["without"]["correct"] == int(without.correct.sum())


def test_corners_are_those_of_four_corners(models, results, held_out):
    found = four_corners(*models, held_out, engine="hooks")
    for layer, effects in zip(results["gain"]["corners"], found.effects.mean(-1), strict=True):
        shown = [layer[name]["effect"] for name in ("below", "above", "interaction")]
        assert shown == pytest.approx(effects.tolist(), abs=1e-3)


def test_it_is_on_the_page_in_tables_and_figures(done, results):
    out, _ = done
    page = (out / "report.html").read_text()
    assert 'id="gain"' in page and 'id="circuits"' not in page and 'id="mechanism"' not in page
    assert "a loss" not in page
    assert f"Fine-tuning changed {results['gain']['n_units']} units of the weights" in page
    schema = resources.files("tl_entity.study").joinpath("results.schema.json").read_text()
    Draft202012Validator(json.loads(schema)).validate(results)
    units = pd.read_csv(out / "tables" / "gain_units.csv")
    assert units["share"].sum() == pytest.approx(results["gain"]["sum_of_shares"], abs=1e-4)
    assert units["rank"].tolist() == list(range(1, len(units) + 1))
    study = Study.load(out / STUDY)
    assert set(gain_figures(study)) == {"gain_kinds", "gain_shares", "gain_grafts", "gain_corners"}
    names = [path.stem for kind in ("figures/*.html", "tables/*.csv") for path in out.glob(kind)]
    assert {name for name in names if name.startswith("gain")} >= set(gain_figures(study))
    for name in names:
        assert set(experiments_for([name])) <= {"gain"}


@pytest.mark.parametrize("stop_at", ["gain: shares of the weights", "gain: four corners"])
def test_stopped_and_begun_again_it_ends_with_the_same_bytes(settings, done, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        reproduce(settings, tmp_path, progress=Watch(stop_at))
    watch = Watch()
    reproduce(settings, tmp_path, progress=watch)
    assert watch.seen == done[1].seen[done[1].seen.index(stop_at) :]
    assert files(tmp_path) == files(done[0])


def test_how_much_lies_in_the_mechanism(settings, models, tmp_path):
    quick = {"first_steps": 12, "steps": 6, "most_prices": 2, "prunings": 0}
    both = replace(
        settings,
        only=("mechanism", "gain"),
        mechanism_prompts=150,
        target=0.6,
        agreement=0.6,
        gate_training=quick,
    )
    results = reproduce(both, tmp_path)
    seed = results["seeds"]["gain"]
    prompts = box_prompts(models[0].tokenizer, 6, n_boxes=3, seed=seed)
    shares = weight_shares(*models, prompts)
    nodes = results["models"]["tuned"]["mechanism"]["nodes"]
    heads = {(layer, head) for layer, head, _ in nodes}
    inside = results["gain"]["inside"]["mechanism of tuned"]["parts"]["inside"]
    # Units all of whose query heads are in the mechanism, counted anew.
    of_heads = [u for u in shares.units if (r := shares.readers(u)) and heads.issuperset(r)]
    assert inside["n_units"] == len(of_heads)
    total = sum(shares.share(unit) for unit in of_heads)
    assert inside["share"] == pytest.approx(total, abs=1e-4)


def test_equal_weights_are_a_reason_and_no_end(settings, tmp_path):
    results = reproduce(replace(settings, tuned=settings.base), tmp_path)
    assert "same weights" in results["gain"]["why_not"]
    page = (tmp_path / "report.html").read_text()
    assert "The gain could not be put down to weights" in page


def test_a_base_without_the_ability_gains_too(settings, tmp_path):
    """The fine-tune may have learnt the task from nothing."""
    blank = save_tiny_model(tmp_path / "blank", seed=1)
    tensors = load_file(blank / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    embed = tensors["model.embed_tokens.weight"]
    drawn = torch.randn(embed.shape, generator=generator) * embed.float().std()
    tensors["model.embed_tokens.weight"] = drawn.to(embed.dtype)
    save_file(tensors, blank / "model.safetensors", metadata={"format": "pt"})
    results = reproduce(replace(settings, base=str(blank)), tmp_path / "out")
    assert results["models"]["base"]["no_circuit"] is not None
    assert results["gain"]["gain"] > 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="gain"' in page and "what tuned gains over blank" in page


def test_a_loss_is_called_one(settings, tmp_path):
    back = replace(settings, base=settings.tuned, tuned=settings.base)
    results = reproduce(back, tmp_path)
    assert results["gain"]["gain"] < 0
    page = (tmp_path / "report.html").read_text()
    assert "the gain is below zero: a loss" in page
    kinds = results["gain"]["by_kind"]
    most = max(kinds, key=lambda kind: kinds[kind]["of_gain"])
    assert kinds[most]["share"] < 0
    assert f"Of the gain, {kinds[most]['of_gain']:.0%} in {most}" in page


def test_one_model_gains_nothing(settings, tmp_path):
    with pytest.raises(InputError, match="There can be no gain: there is one model alone"):
        reproduce(replace(settings, tuned=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_grafts_are_not_judged_on_the_prompts_of_the_shares(models):
    from tl_entity.study.gain import _without

    prompts = box_prompts(models[0].tokenizer, 6, n_boxes=2, seed=0)
    left = _without(prompts[torch.tensor([0, 1, 2, 2, 3])], prompts[torch.tensor([1, 5])])
    assert torch.equal(left.tokens, prompts.tokens[torch.tensor([0, 2, 3])])
