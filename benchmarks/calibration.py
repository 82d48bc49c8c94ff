"""How often `judge_pair` is right, on pairs whose truth is known.

python benchmarks/calibration.py measure FOLDER --prompts 200 --seeds 0-5
python benchmarks/calibration.py table FOLDER --out docs/trust.md

The first measures each pair once and keeps what it measured in the folder, a file a pair; what is
there is not measured again. The second judges them all and writes tables and a figure into the
page.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from calibration_table import write_tables
from calibration_truth import faithful_in_truth, fresh_gain

from tl_entity import DESIDERATA, box_prompts, desideratum_pairs, load_model
from tl_entity.methods.judge_pair import QUICK, measure_pair
from tl_entity.output import write_atomically
from tl_entity.tasks.desiderata import MAIN_DESIDERATA
from tl_entity.training.known_pairs import KINDS, known_pair

N_OTHERS = 100
N_INFORMATION = 60


def measure(job: tuple[Path, str, int, int, bool]) -> None:
    """One pair: the evidence, and what of the truth has to be measured."""
    folder, kind, seed, n_prompts, mechanisms = job
    path = folder / f"{kind}-{seed}-{n_prompts}.evidence"
    if path.exists():
        return
    torch.set_num_threads(1)
    # Numbers that small slow processors down and change nothing.
    torch.set_flush_denormal(True)
    pair = known_pair(kind, seed)
    tokenizer = load_model("default-base").tokenizer
    assert set(MAIN_DESIDERATA) <= set(DESIDERATA)
    drawn = 10_000 * seed + n_prompts
    prompts = box_prompts(tokenizer, n_prompts, n_boxes=7, seed=drawn + 1)
    evidence = measure_pair(
        pair.base,
        pair.tuned,
        prompts,
        others=box_prompts(tokenizer, N_OTHERS, n_boxes=7, seed=drawn + 2),
        information={
            name: desideratum_pairs(
                tokenizer, name, min(N_INFORMATION, n_prompts), n_boxes=7, seed=drawn + 3
            )
            for name in MAIN_DESIDERATA
        },
        training=QUICK if mechanisms else None,
        seed=seed,
    )
    truth = fresh_gain(pair) | faithful_in_truth(pair, evidence)
    write_atomically(path.with_suffix(".truth"), repr(truth).encode())
    evidence.save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--prompts", type=int, nargs="*", default=[200])
    parser.add_argument("--seeds", default="0-5", help="first-last")
    parser.add_argument("--mechanisms", action="store_true", help="search for mechanisms too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/trust.md"))
    asked = parser.parse_args(arguments)
    if asked.what == "table":
        write_tables(asked.folder, asked.out)
        return
    first, last = map(int, asked.seeds.split("-"))
    asked.folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (asked.folder, kind, seed, n, asked.mechanisms)
        for n in asked.prompts
        for seed in range(first, last + 1)
        for kind in asked.kinds
    ]
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        for done, _ in enumerate(pool.imap_unordered(measure, jobs), start=1):
            sys.stderr.write(f"{done} of {len(jobs)}\n")


if __name__ == "__main__":
    main()
