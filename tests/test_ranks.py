"""Two processes give what one gives."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from tests.random_models import random_model, random_pairs
from tl_entity import (
    Head,
    InputError,
    PairBatch,
    Runner,
    activation_patch,
    evaluate,
    evaluate_circuits,
    four_corners,
    learn_mask,
    logit_attribution,
    logit_lens,
    mean_head_outputs,
    path_patch,
    weight_shares,
)
from tl_entity.metrics import LOGIT_DIFFERENCE
from tl_entity.ranks import Together, from_first, is_first, n_ranks, process_group, shared_out

CIRCUITS = [{"place": [Head(1, 2)], "last": [Head(2, 0)]}, {"last": [Head(0, 1)]}]


def results(n_pairs: int) -> dict[str, torch.Tensor]:
    """A bit of everything whose prompts are shared out."""
    model = random_model(n_kv_heads=2)
    pairs = random_pairs(n_pairs)
    values = torch.zeros(3, 9, 4, 8, dtype=torch.float64)
    found = {}
    for engine in ("exact", "hooks"):
        how = {"receivers": [Head(2, 1)], "receiver_input": "q", "engine": engine}
        scores = path_patch(model, pairs, **how)
        found[f"{engine} scores"] = scores.per_example
        found[f"{engine} clean"] = scores.clean_values
        circuits = evaluate_circuits(
            model, pairs.clean, CIRCUITS, mean_outputs=values, engine=engine
        )
        for index, evaluation in enumerate(circuits):
            found[f"{engine} circuit {index}"] = evaluation.answer_log_probability
            found[f"{engine} answers {index}"] = evaluation.predicted
        found[f"{engine} mask"] = learn_mask(
            model,
            pairs,
            [Head(1, 0), Head(1, 3), Head(2, 2)],
            position="place",
            validation=pairs,
            batch_size=3,
            epochs=4,
            engine=engine,
        ).trajectory
    tuned = random_model(n_kv_heads=2)
    tuned.blocks[1].attn.W_Q.data[2] *= 1.3
    shares = weight_shares(model, tuned, pairs, batch_size=2)
    found["shares"], found["gain"] = shares.per_prompt, shares.gain_per_prompt
    found["corners"] = four_corners(model, tuned, pairs.clean).change
    found["correct"] = evaluate(model, pairs.clean).correct
    foiled = replace(pairs, foils=(pairs.targets + 1) % 20)
    found["parts"] = logit_attribution(model, foiled, batch_size=2).per_example
    found["lens"] = logit_lens(model, foiled).per_example
    patched = activation_patch(model, foiled, CIRCUITS[0], metric=LOGIT_DIFFERENCE)
    found["differences"] = cast(torch.Tensor, patched.values)
    both = Together(pairs, torch.arange(n_pairs))
    (found["together"],) = Runner().over(both, 2, _sums, model)
    found["means"] = mean_head_outputs(model, pairs.clean, batch_size=2)
    return found


def _sums(rows: Together) -> tuple[torch.Tensor, ...]:
    pairs, numbers = rows.parts
    return (cast(PairBatch, pairs).targets + cast(torch.Tensor, numbers),)


def in_each_process(folder: Path) -> None:
    """What `torchrun` starts below."""
    torch.set_num_threads(1)
    with process_group():
        found = {f"{name} of {n}": tensor for n in (5, 1) for name, tensor in results(n).items()}
        found["ranks"] = torch.tensor(n_ranks())
        found["first"] = torch.tensor(is_first())
        found["drawn"] = torch.tensor(from_first(lambda: os.getpid()))
        try:
            from_first(lambda: refuse())
        except InputError as error:
            found["refused"] = torch.tensor("in the first" in str(error))
        torch.save(found, folder / f"{os.environ['RANK']}.pt")


def refuse() -> None:
    raise InputError("No such thing in the first process.")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    code = (
        "from pathlib import Path; from tests.test_ranks import in_each_process; "
        f"in_each_process(Path({str(folder)!r}))"
    )
    script = folder / "run.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script)],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_every_process_has_the_results_of_one(ranks: list[dict[str, torch.Tensor]]) -> None:
    for n in (5, 1):
        for name, expected in results(n).items():
            for rank in ranks:
                found = rank[f"{name} of {n}"]
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12, msg=name)


def test_the_first_process_decides(ranks: list[dict[str, torch.Tensor]]) -> None:
    assert [rank["ranks"].item() for rank in ranks] == [2, 2]
    assert [rank["first"].item() for rank in ranks] == [True, False]
    assert ranks[0]["drawn"] == ranks[1]["drawn"]
    assert all(rank["refused"].item() for rank in ranks)


def test_alone_nothing_is_shared() -> None:
    with process_group():
        assert n_ranks() == 1
        assert is_first()
        assert from_first(lambda: 3) == 3
    assert shared_out([1, 2], lambda rows: (torch.tensor(rows),))[0].tolist() == [1, 2]
