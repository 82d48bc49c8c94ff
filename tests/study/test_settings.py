"""Sizes where none are given, and settings that make no sense."""

import pytest

from tl_entity.errors import InputError
from tl_entity.study.settings import GROUPS, Settings, resolve_sizes, stream_seed


def sizes(n_heads, **given):
    found, receivers = resolve_sizes(Settings(base="no planted circuit", **given), n_heads)
    return [found[group] for group in GROUPS], [receivers[group] for group in GROUPS[:-1]]


def test_the_papers_model_gets_the_papers_sizes():
    assert sizes(1024) == ([40, 7, 20, 5], [20, 5, 10])


def test_small_models_get_groups_of_two_at_least():
    assert sizes(16) == ([2, 2, 2, 2], [2, 2, 2])


def test_given_sizes_are_kept():
    given = dict(zip(GROUPS, (6, 4, 3, 1), strict=True))
    receivers = dict(zip(GROUPS[:-1], (1, 2, 3), strict=True))
    assert sizes(16, sizes=given, receiver_sizes=receivers) == ([6, 4, 3, 1], [1, 2, 3])


@pytest.mark.parametrize("what", ["sizes", "receiver_sizes"])
@pytest.mark.parametrize("count", [0, 17])
def test_sizes_that_the_model_cannot_fill_are_refused(what, count):
    groups = GROUPS if what == "sizes" else GROUPS[:-1]
    given = dict.fromkeys(groups, 2) | {"pos_detector": count}
    with pytest.raises(InputError, match=f"pos_detector.* {count} heads.* 16"):
        sizes(16, **{what: given})


@pytest.mark.parametrize("name", ["prompts", "pairs", "boxes", "batch_size", "seed", "mask_seeds"])
def test_too_small_numbers_are_refused(name):
    with pytest.raises(InputError, match=name.replace("_", " ")):
        Settings(**{name: -1})


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_memory_that_makes_no_sense_is_refused(gib):
    with pytest.raises(InputError, match="Memory must be above 0 GiB"):
        Settings(memory=gib)


def test_every_purpose_has_its_own_seed():
    purposes = [("accuracy", n) for n in range(9)] + [("pairs",), ("faithfulness",)]
    assert len({stream_seed(seed, *p) for seed in (0, 1) for p in purposes}) == 2 * len(purposes)


@pytest.mark.parametrize("prices", [(), (-0.1,), (float("nan"),), (0.1, 0.1)])
def test_prices_that_make_no_sense_are_refused(prices):
    with pytest.raises(InputError, match=r"Sparsities are prices|Every sparsity"):
        Settings(sparsities=prices)


def test_what_others_read_names_no_place_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/llama", "somebody/mine"):
        (tmp_path / folder).mkdir(parents=True)
    public = Settings(
        base=str(tmp_path / "somebody" / "mine"),
        base_adapter="../gone/lora",
        tuned="models/llama",
        tuned_adapter="owner/name",
        control="default-base",
    ).public()
    names = ("base", "base_adapter", "tuned", "tuned_adapter", "control", "control_adapter")
    shown = [public[name] for name in names]
    # A place that is not there can't be loaded either, and never comes so far.
    assert shown == ["mine", "../gone/lora", "models/llama", "owner/name", "default-base", None]


@pytest.mark.parametrize(
    "name", ["prompts", "pairs", "random_circuits", "mask_pairs", "draws", "mask_seeds"]
)
def test_more_than_anybody_waits_for_is_refused_at_once(name):
    with pytest.raises(InputError, match=f"{name.replace('_', ' ')} must be at most"):
        Settings(**{name: 10**9})
