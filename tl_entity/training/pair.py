"""The default pair from beginning to end: train, store, measure, describe."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.methods.discovery import discover_circuit
from tl_entity.models.load import load_model
from tl_entity.models.registry import PLANTED_FILE
from tl_entity.output import write_atomically
from tl_entity.tasks.pairs import discovery_pairs
from tl_entity.training.card import write_cards
from tl_entity.training.guidance import PLANTED
from tl_entity.training.measure import HELD_OUT_SEED, accuracy_by_boxes, interchange
from tl_entity.training.tokenizer import build_tokenizer, save_tokenizer
from tl_entity.training.train import (
    CONTROL,
    TUNED,
    BaseTraining,
    FineTuning,
    fine_tune,
    one_thread,
    save_model,
    scale_logits,
    stored_model,
    train_base,
)

FIGURES_FILE = "figures.json"
SOFTENING = 4
"""What the finished base's logits are divided by.

A model that is right on 7 of 10 prompts and knows how sure to be gives path-patching scores whose
mean over prompts is near zero for every head: a few prompts that it gets wrong with confidence
weigh as much as all others. Softer probabilities take that away, and change no prediction.
"""
N_BOXES_MEASURED = range(2, 11)


@checked
def train_default_pair(
    out: Path,
    *,
    seed: int = 0,
    n_prompts: int = 1000,
    n_pairs: int = 200,
    base: BaseTraining | None = None,
    fine_tunings: Mapping[str, FineTuning] | None = None,
) -> dict[str, Any]:
    """Train the base, its fine-tune and the control fine-tune, and measure all three.

    Writes `base/` and `tuned/` (checkpoint, tokenizer, planted heads, model card) and
    `figures.json` into `out`; the control's weights are not kept. One CPU thread is used, so that
    the same seed gives the same bytes on one machine with one release of torch.

    Args:
        out: the folder; what it holds of these names is replaced.
        seed: for weights, prompts and texts.
        n_prompts: held-out prompts for each accuracy.
        n_pairs: pairs for path patching and for the interchange test.
        base: how the base is trained; as the pair that ships, by default.
        fine_tunings: `"tuned"` and `"control"`; as the pair that ships, by default.

    Returns:
        What `figures.json` holds.

    Raises:
        InputError: if the folder can't be written.
    """
    fine_tunings = fine_tunings or {"tuned": TUNED, "control": CONTROL}
    scratch = out / "unfinished"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: the folder can't be written ({error.strerror}).") from None
    tokenizer = build_tokenizer()
    figures: dict[str, Any] = {
        "seed": seed,
        "prompts": n_prompts,
        "pairs": n_pairs,
        "held_out_seed": HELD_OUT_SEED,
        "models": {},
    }
    try:
        with one_thread():
            model = train_base(tokenizer, seed=seed, settings=base)
            scale_logits(model, 1 / SOFTENING)
            _store(model, scratch / "base")
            for name, settings in fine_tunings.items():
                # Always from the stored base: what ships is what the fine-tunes start from.
                model = stored_model(scratch / "base")
                scale_logits(model, SOFTENING)
                fine_tune(model, tokenizer, settings, seed=seed, name=name)
                _store(model, scratch / name)
            for name in ("base", *fine_tunings):
                figures["models"][name] = _measure(scratch / name, tokenizer, n_prompts, n_pairs)
        for name in ("base", "tuned"):
            shutil.rmtree(out / name, ignore_errors=True)
            (scratch / name).rename(out / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_atomically(out / FIGURES_FILE, json.dumps(figures, indent=1) + "\n")
    write_cards(out, [figures])
    return figures


def _store(model: Any, folder: Path) -> None:
    save_model(model, folder)
    save_tokenizer(folder)
    PLANTED.save(folder / PLANTED_FILE)


def _measure(
    folder: Path, tokenizer: PreTrainedTokenizerBase, n_prompts: int, n_pairs: int
) -> dict[str, Any]:
    """All figures of one stored model."""
    model = stored_model(folder)
    found = discover_circuit(
        load_model(folder),
        discovery_pairs(tokenizer, n_pairs, seed=HELD_OUT_SEED),
        sizes=PLANTED.sizes,
    )
    return {
        "accuracy": accuracy_by_boxes(
            model, tokenizer, n_boxes=N_BOXES_MEASURED, n_prompts=n_prompts
        ),
        "interchange": interchange(model, tokenizer, PLANTED, n_pairs=n_pairs),
        "path_patching": {
            group.name: {
                "planted": [
                    _score(found, group.name, head.layer, head.head) for head in group.heads
                ],
                "lowest_other": min(
                    round(score, 4)
                    for layer, row in enumerate(found.scores[group.name].scores.tolist())
                    for head, score in enumerate(row)
                    if (layer, head) not in group.heads
                ),
            }
            for group in PLANTED
        },
    }


def _score(found: Any, group: str, layer: int, head: int) -> float:
    return round(found.scores[group].scores[layer, head].item(), 4)
