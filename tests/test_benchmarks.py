"""The benchmarks' own hooks compute what the exact engine does: what is timed is the same."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

from tests.random_models import random_model
from tl_entity import PairBatch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Every job on a small random model, to be set up."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import engine_jobs
    import engine_models

    model = random_model(dtype=torch.float32, n_ctx=64)
    monkeypatch.setitem(engine_models.RANDOM, "small", {})
    options = argparse.Namespace(receivers=None, prompts=2, boxes=3, quick=True, only=None)
    pairs: PairBatch = engine_models.random_pairs(model, 2, 3)
    clock = engine_jobs.Clock(torch.device("cpu"))
    yield engine_jobs.engines_of(model, "small", pairs, options, clock)
    for name in ("engine_jobs", "engine_models"):
        sys.modules.pop(name, None)


def test_both_engines_of_every_job_agree(jobs: dict) -> None:
    assert "v at previous query label" in jobs and "patching from another model" in jobs
    for name, set_up in jobs.items():
        both = set_up()
        exact = both.compared(both.exact())
        for run in (both.hooks, both.plain):
            if run is not None:
                _, _, hooks = run()
                torch.testing.assert_close(
                    hooks, exact[: len(hooks)] if run is both.hooks else exact[::4][: len(hooks)],
                    atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}",
                )  # fmt: skip
