"""Plans: from a configuration alone, for all that the main job does, as text and as JSON."""

import json

import pytest
import torch

from tests.random_models import random_model
from tests.study.helpers import save_random_model
from tl_entity import Head, load_model
from tl_entity.cli import main
from tl_entity.errors import InputError
from tl_entity.planning.jobs import PathPatching
from tl_entity.planning.plan import (
    box_layout,
    entity_tracking_jobs,
    n_parameters,
    plan,
    read_configuration,
    spread_heads,
)
from tl_entity.tasks.boxes import box_prompts

SIZES = {"value_fetcher": 3, "pos_transmitter": 2, "pos_detector": 2, "struct_reader": 1}
RECEIVERS = {"value_fetcher": 2, "pos_transmitter": 1, "pos_detector": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), seed=1)


def test_a_configuration_counts_like_its_model(folder):
    model = load_model(folder, device="cpu")
    cfg, _ = read_configuration(str(folder), device="cpu")
    pairs = box_layout(5)
    jobs = entity_tracking_jobs(cfg, sizes=SIZES, receivers=RECEIVERS)
    from_model = plan(model, pairs, jobs, timed=False)
    from_configuration = plan(cfg, pairs, jobs, timed=False)
    assert from_model == from_configuration
    assert from_model.seconds is None
    assert [len(job.operations) > 0 for job in from_model.jobs] == [True] * len(jobs)
    assert len(jobs) == 4 + 1 + 3 + 1 + 1


def test_parameters_are_those_of_the_model():
    for n_kv_heads in (4, 2):
        model = random_model(n_kv_heads=n_kv_heads)
        weights = [w for name, w in model.named_parameters() if ".b_" not in name]
        weights = [w for w in weights if not (w.ndim < 3 and w.shape[-1] == model.cfg.d_head)]
        assert n_parameters(model.cfg) == sum(weight.numel() for weight in weights)


def test_no_weights_are_needed(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    cfg, tokenizer = read_configuration(str(tmp_path), device="cpu")
    assert cfg.n_layers > 0
    assert tokenizer is not None


def test_without_a_tokenizer_prompts_have_the_length_of_words_and_marks():
    pairs = box_layout(3, n_boxes=2)
    assert pairs.clean.tokens.shape == (3, len("The apple is in Box E , ".split()) * 2 + 4)
    query = pairs.clean.position("query_label")
    assert bool((pairs.clean.position("previous_query_label") < query).all())
    assert pairs.clean.position("last").tolist() == [17, 17, 17]


def test_the_layout_is_that_of_real_prompts(folder):
    """With a tokenizer that has a token for each word, but for its first token."""
    _, tokenizer = read_configuration(str(folder), device="cpu")
    assert tokenizer is not None
    real, layout = box_prompts(tokenizer, 50, n_boxes=3, seed=0), box_layout(50, n_boxes=3).clean
    bos = real.tokens.shape[1] - layout.tokens.shape[1]
    assert bos in (0, 1)
    for name in ("last", "query_label"):
        assert torch.equal(real.position(name), layout.position(name) + bos)
    places = {int(at) + bos for at in layout.position("previous_query_label")}
    assert places == set(real.position("previous_query_label").tolist())


def test_heads_are_spread_over_the_upper_half():
    cfg = random_model(n_layers=6, n_heads=4).cfg
    assert {head.layer for head in spread_heads(cfg, 3)} == {3, 4, 5}
    every = spread_heads(cfg, 12)
    assert len(set(every)) == 12
    assert {head.layer for head in every} == {3, 4, 5}
    assert all(0 <= head.head < 4 for head in every)
    with pytest.raises(InputError, match="13 heads"):
        spread_heads(cfg, 13)


def test_known_receivers_are_counted_as_they_are():
    cfg = random_model(n_layers=4, n_ctx=64).cfg
    receivers = {**RECEIVERS, "value_fetcher": [Head(2, 1)]}
    jobs = entity_tracking_jobs(cfg, sizes=SIZES, receivers=receivers)
    assert jobs["path patching, pos_transmitter"] == PathPatching("last", (Head(2, 1),), "q")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sizes": {}}, "how many heads the group value_fetcher has"),
        ({"receivers": {}}, "how many heads of value_fetcher are patched into"),
    ],
)
def test_jobs_need_sizes_and_receivers(changes, expected):
    cfg = random_model().cfg
    with pytest.raises(InputError, match=expected):
        entity_tracking_jobs(cfg, **{"sizes": SIZES, "receivers": RECEIVERS, **changes})


def test_a_plan_needs_jobs_and_prompts_that_fit():
    cfg = random_model(n_ctx=32).cfg
    with pytest.raises(InputError, match="at least one job"):
        plan(cfg, box_layout(2), {})
    with pytest.raises(InputError, match="prompts of 32 tokens; these have 53"):
        plan(cfg, box_layout(2), {"logits": PathPatching("last")})


def test_the_command_prints_a_table(capsys, folder):
    assert main(["plan", "--model", str(folder), "--prompts", "4", "--boxes", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "4 prompts of up to" in said.out
    assert "path patching, struct_reader" in said.out
    assert "all, one after another" in said.out


def test_the_command_prints_json(capsys, folder):
    arguments = ["plan", "--model", str(folder), "--prompts", "4", "--boxes", "3", "--json"]
    assert main([*arguments, "--untimed"]) == 0
    untimed = json.loads(capsys.readouterr().out)
    assert untimed["seconds"] is None
    assert main(arguments) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["seconds"] == pytest.approx(sum(job["seconds"] for job in timed["jobs"]))
    counted = [job["total_operations"] for job in timed["jobs"]]
    assert counted == [job["total_operations"] for job in untimed["jobs"]]
    assert timed["machine"]["matmul"][0]["flop_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--prompts", "0"], "at least 1"),
        (["--sizes", "1,2"], "'1,2' is not 4 positive whole numbers"),
        (["--sizes", "99,1,1,1"], "can't be 99 heads"),
        (["--boxes", "10"], "takes prompts of 64 tokens"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_sentence(capsys, folder, arguments, expected):
    assert main(["plan", "--model", str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tl-entity: ")
    assert expected in line
