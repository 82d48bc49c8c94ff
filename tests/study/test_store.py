"""Finished steps are found again; unfinished or spoilt ones are not."""

import json
import math
from pathlib import Path

import pytest
import torch

from tl_entity.errors import InputError
from tl_entity.output import check_writable
from tl_entity.study.store import REPORT, RESULTS, Store, number_record, read_number, to_json


class Work:
    def __init__(self, value=1.5):
        self.runs, self.value = 0, value

    def __call__(self):
        self.runs += 1
        return {"value": self.value}, {"t": torch.arange(3)}


def test_a_step_is_done_once_for_the_same_inputs(tmp_path):
    work = Work()
    first = Store(tmp_path).step("a", {"x": 1}, work)
    again = Store(tmp_path).step("a", {"x": 1}, work)
    assert work.runs == 1
    assert first[0] == again[0] == {"value": 1.5}
    assert torch.equal(again[1]["t"], torch.arange(3))
    Store(tmp_path).step("a", {"x": 2}, work)
    assert work.runs == 2


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_spoilt_file_is_made_again(tmp_path, ending):
    work = Work()
    Store(tmp_path).step("a", {}, work)
    path = next(tmp_path.rglob(f"a.{ending}"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    Store(tmp_path).step("a", {}, work)
    assert work.runs == 2
    assert path.read_bytes() == whole


def test_a_step_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).step("a", {}, interrupted)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_results_that_no_longer_hold_are_removed(tmp_path):
    store = Store(tmp_path)
    store.step("a", {"x": 1}, Work())
    for name in (RESULTS, REPORT):
        store.write(name, "old")
    store.step("a", {"x": 1}, Work())
    assert (tmp_path / RESULTS).exists()
    store.step("a", {"x": 2}, Work())
    assert not (tmp_path / RESULTS).exists() and not (tmp_path / REPORT).exists()


def test_a_file_in_the_way_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(InputError, match="/proc/out"):
        check_writable(Path("/proc/out"))


def test_json_is_sorted_and_has_no_nan():
    content = {"b": [1.0, math.nan], "a": {"z": [[0, 1]], 7: "<"}, "e": []}
    text = to_json(content)
    assert json.loads(text) == {"b": [1.0, None], "a": {"z": [[0, 1]], "7": "<"}, "e": []}
    assert text.index('"a"') < text.index('"b"')


def test_infinity_comes_back_from_a_record(tmp_path):
    numbers = [0.5, math.inf, math.nan]

    def compute():
        return {"numbers": [number_record(number) for number in numbers]}, {}

    record, _ = Store(tmp_path).step("a", {}, compute)
    assert record["numbers"] == [0.5, "infinite", None]
    found = [read_number(number) for number in record["numbers"]]
    assert found[:2] == numbers[:2] and math.isnan(found[2])
