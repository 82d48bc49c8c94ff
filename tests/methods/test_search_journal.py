"""A search that is killed goes on where it was, and ends with the same result."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.methods.planted import by_role, crowded_model, planted_pairs
from tl_entity import GateTraining, InputError, Mechanism, find_mechanism, pooled_ablation
from tl_entity.results import pack

MODEL = crowded_model()
PROMPTS = by_role(planted_pairs(240, seed=1).clean)
ABLATION = pooled_ablation(MODEL, by_role(planted_pairs(100, seed=2).clean))
TRAINING = GateTraining(first_steps=20, steps=10, prompts_per_step=16)

KILLED = """
    import sys
    from tests.methods.test_search_journal import search
    search(sys.argv[1])
"""


def search(folder, **how) -> Mechanism:
    how = {"training": TRAINING, "curve": (2.0,), "n_random": 1, **how}
    return find_mechanism(MODEL, PROMPTS, ablation=ABLATION, folder=folder, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return folder, search(folder)


def test_a_search_that_is_kept_gives_what_one_that_is_not_does(whole) -> None:
    folder, kept = whole
    plain = search(None)
    assert pack(kept) == pack(plain)
    # Called again, every step is read.
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pack(search(folder)) == pack(kept)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.parametrize("how", [{"precision": "bfloat16"}, {"loss": "metric"}])
def test_whatever_is_searched_in_is_read_back(how, tmp_path) -> None:
    settings = GateTraining(first_steps=6, steps=3, prompts_per_step=16, most_prices=3, **how)
    engine = "hooks" if "loss" in how else "exact"
    first, again = (search(tmp_path, training=settings, engine=engine) for _ in range(2))
    plain = search(None, training=settings, engine=engine)
    assert pack(first) == pack(again) == pack(plain)


def test_a_search_that_is_killed_goes_on(whole, tmp_path) -> None:
    _, expected = whole
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    process = subprocess.Popen(command, env=env)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("*.step.safetensors"))) < 15 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.step.safetensors")}
    assert len(kept) >= 15
    assert pack(search(tmp_path)) == pack(expected)
    # What was there was not run again, and more was there to run.
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.step.safetensors")}
    assert {path: after[path] for path in kept} == kept and len(after) > len(kept)


def test_steps_of_another_search_are_refused(whole, tmp_path) -> None:
    folder, _ = whole
    for how in ({"seed": 1}, {"target": 0.8}, {"training": GateTraining(first_steps=21)}):
        with pytest.raises(InputError, match="steps of another search"):
            search(folder, **how)
    other = pooled_ablation(MODEL, by_role(planted_pairs(100, seed=9).clean))
    with pytest.raises(InputError, match="steps of another search"):
        find_mechanism(MODEL, PROMPTS, ablation=other, training=TRAINING, folder=folder)
    for path in sorted(folder.glob("*.step.safetensors"))[1:4]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"lacks 00000\.step"):
        search(tmp_path)
    damaged = sorted(folder.glob("*.step.safetensors"))[0].read_bytes()
    (tmp_path / "00000.step.safetensors").write_bytes(damaged[:-40])
    with pytest.raises(InputError):
        search(tmp_path)
