"""What models can do of the tasks that ship, as a Markdown table.

    python benchmarks/abilities.py smollm2.gguf qwen.gguf --prompts 100

For each model and task: the share of prompts whose most likely next token is the answer, and the
share in which the answer beats the foil, with 95 % intervals.
"""

import argparse
import sys
from pathlib import Path

import torch

from tl_entity import load_model
from tl_entity.hooks.run import answer_logits
from tl_entity.stats import wilson_interval
from tl_entity.tasks.shipped.draw import TASKS, task_pairs, task_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="names, folders or GGUF files")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    write("| model | task | answer is the most likely token | answer beats foil | words left out |")
    write("|---|---|---|---|---|")
    for name in settings.models:
        model = load_model(name)
        for task in settings.tasks:
            write(f"| {Path(name).stem} | {row(model, task, settings.prompts, settings.seed)} |")


def write(line: str) -> None:
    """A line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@torch.no_grad()
def row(model, task: str, n: int, seed: int) -> str:
    """One task's cells."""
    pairs = task_pairs(task, model.tokenizer, n, seed)
    most_likely = beats = 0
    for chunk in pairs.chunks(20):
        logits = answer_logits(model, chunk.clean)
        at = torch.stack([chunk.targets, chunk.foils], 1).to(logits.device)
        target, foil = logits.gather(1, at).unbind(1)
        beats += int((target > foil).sum())
        most_likely += int((logits.argmax(1) == at[:, 0]).sum())
    words = task_words(task, model.tokenizer).left_out.values()
    left_out = ", ".join("/".join(word) for of_list in words for word in of_list) or "none"
    return f"{task} | {cell(most_likely, n)} | {cell(beats, n)} | {left_out}"


def cell(right: int, n: int) -> str:
    """A share with its interval."""
    low, high = wilson_interval(right, n)
    return f"{right / n:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
