"""How a real model is fine-tuned and watched."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from tl_entity._typing import checked
from tl_entity.choices import Dtype, SkillKind
from tl_entity.errors import InputError, did_you_mean

SKILLS: tuple[str, ...] = get_args(SkillKind)
"""The kinds of text."""

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a block that an adapter can change."""

MOST: Mapping[str, int] = {
    "steps": 10_000_000,
    "texts": 100_000,
    "rank": 100_000,
    "evaluate_every": 10_000_000,
    "prompts": 100_000,
    "boxes": 1_000,
    "checkpoint_every": 10_000_000,
}
"""Largest values of settings that are counts; what no machine does, or nobody waits for."""


@checked
@dataclass(frozen=True)
class FinetuneSettings:
    """How an adapter is trained and watched.

    The loss is the mean over texts of each text's mean cross-entropy, so that a share in the mix is
    a share of the loss, however few tokens of a text are learned: in look-up and arithmetic the
    answers alone, since all before them is random; in stories every word, which keeps the model's
    manner of writing.

    The command line makes its options, and explains them, from what stands here.

    Attributes:
        mix: kinds of text and their shares.
        steps: optimiser steps (AdamW, constant learning rate, no weight decay).
        texts: texts a step.
        learning_rate: of AdamW.
        rank: rank of the adapter's matrices.
        alpha: scale of the adapter times its rank; None for twice the rank.
        targets: layers that get an adapter.
        seed: of the texts and the adapter's first values.
        evaluate_every: steps between two evaluations on the box task; there is also one before the
            first step and one after the last.
        prompts: box prompts an evaluation, the same ones whatever the seed.
        boxes: boxes in a prompt.
        checkpoint_every: steps between two adapters that are kept; the last is kept in any case.
        dtype: of the base's weights; the adapter's are float32 at least.

    Raises:
        InputError: if a value can't be used.
    """

    mix: Mapping[str, float] = field(
        default_factory=lambda: {"lookup": 1.0, "arithmetic": 1.0, "stories": 1.0}
    )
    steps: int = 80
    texts: int = 8
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    seed: int = 0
    evaluate_every: int = 20
    prompts: int = 100
    boxes: int = 7
    checkpoint_every: int = 20
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for kind, share in self.mix.items():
            if kind not in SKILLS:
                raise InputError(
                    f"{kind!r} is no kind of text; there are {', '.join(SKILLS)}"
                    f"{did_you_mean(kind, SKILLS)}"
                )
            if not (math.isfinite(share) and share > 0):
                raise InputError(f"The share of {kind} is {share:g}; it must be above 0.")
        if not self.mix:
            raise InputError(f"The mix is empty; name kinds of text: {', '.join(SKILLS)}.")
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(
                    f"{name} must be at least 1 and at most {most}, not {getattr(self, name)}."
                )
        for name in ("learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be above 0, not {value:g}.")
        for target in self.targets:
            if target not in LAYERS:
                raise InputError(f"{target!r} is no layer to adapt; there are {', '.join(LAYERS)}.")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise InputError("Name each layer to adapt once, and at least one.")
        if self.dtype not in get_args(Dtype):
            raise InputError(f"dtype {self.dtype} is none of {', '.join(get_args(Dtype))}.")

    def to_json(self) -> dict[str, Any]:
        """As plain values, with what is left open filled in."""
        return {
            **dataclasses.asdict(self),
            "mix": dict(self.mix),
            "alpha": self.alpha or 2 * self.rank,
            "targets": sorted(self.targets),
        }
