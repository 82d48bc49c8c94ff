"""A run that is killed outright goes on from its finished steps and ends with the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.study.helpers import save_tiny_model
from tl_entity.cli import main


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but for how long its steps took."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


TRAINING = '{"first_steps": 12, "steps": 6, "most_prices": 2, "prunings": 0}'
WHAT = {
    "circuits": "--tuned none --random-circuits 1 --all-pairs --only faithfulness,knockout".split(),
    "mechanism and gain": [
        *"--mechanism-prompts 150 --target 0.6 --agreement 0.6 --gain-prompts 4".split(),
        *["--only", "mechanism,gain", "--gate-training", TRAINING],
    ],
}


@pytest.mark.parametrize("what", WHAT)
def test_killed_at_any_step_it_ends_with_the_same_bytes(tmp_path, capsys, what):
    model, tuned = (save_tiny_model(tmp_path / f"model{n}", seed=n) for n in (1, 2))
    given = ["reproduce", *WHAT[what], "--base", str(model), "--prompts", "6", "--boxes", "2"]
    given += ["--no-png", "--quiet"]
    given += ["--tuned", str(tuned)] * ("--tuned" not in given)
    assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    whole = files(tmp_path / "whole")
    killed, kills = tmp_path / "killed", 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for finished in (1, 3):
        process = subprocess.Popen(
            [sys.executable, "-m", "tl_entity", *given, "--out", str(killed)], env=environment
        )
        while process.poll() is None:
            if len(list((killed / "steps").glob("*.safetensors"))) >= finished:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
    assert kills == 2
    assert not (killed / "results.json").exists()
    assert main([*given, "--out", str(killed)]) == 0
    assert files(killed) == whole
