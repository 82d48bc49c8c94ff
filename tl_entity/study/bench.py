"""What the experiments of a study share: a model, its prompts, and where outcomes are kept."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.ablations import make_ablation
from tl_entity.methods.circuits import BATCH_SIZE, Evaluation, evaluate
from tl_entity.metrics import ANSWER_BEATS_FOIL, LOGIT_DIFFERENCE
from tl_entity.studies.design import Part, StudyDesign
from tl_entity.study.settings import Settings, stream_seed
from tl_entity.study.store import Found, Step, Store
from tl_entity.tasks.batches import PairBatch, PromptBatch

OF_FOILS = (LOGIT_DIFFERENCE.name, ANSWER_BEATS_FOIL.name)
"""Metrics that compare the target with a foil."""

SMALL_MODEL, SMALL_MODEL_BATCH = 10_000_000, 128
"""Models with fewer parameters are run on more prompts at a time: there, the time goes into calls,
not into arithmetic."""


class Count(Protocol):
    """Called with how many more runs are done and, where there is one, a note on how they went."""

    def __call__(self, runs: int, note: str = "", /) -> object: ...


Progress = Callable[[str, int], AbstractContextManager[Count]]
"""Called with what is done and how many runs it takes; gives what to call with those done."""


def silent(what: str, total: int) -> AbstractContextManager[Count]:
    """No progress shown."""
    return nullcontext(lambda runs, note="": None)


def own_tokenizer(model: HookedTransformer) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: if it has none.
    """
    if model.tokenizer is None:
        raise InputError("The model has no tokenizer, so no prompts can be written for it.")
    return model.tokenizer


@dataclass
class Bench:
    """One model with all that its experiments share.

    Attributes:
        role: "base" or "tuned".
        model: the model.
        settings: of the study.
        design: what is asked of it.
        inputs: what every outcome depends on: the model's fingerprint, versions, and so on.
        store: where outcomes are kept.
        progress: shows what goes on.
        seeds: every seed that was drawn from the study's, by purpose.
    """

    role: str
    model: HookedTransformer
    settings: Settings
    design: StudyDesign
    inputs: Mapping[str, Any]
    store: Store
    progress: Progress = silent
    seeds: dict[str, int] = field(default_factory=dict)
    _ablations: dict[AblationKind, Ablation] = field(default_factory=dict[AblationKind, Ablation])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""
        return own_tokenizer(self.model)

    def seed(self, *purpose: str | int) -> int:
        """The seed for a purpose, which is noted; the same for every model."""
        drawn = stream_seed(self.settings.seed, *purpose)
        self.seeds[" ".join(map(str, purpose))] = drawn
        return drawn

    def step(
        self, name: str, step: Step[Found], inputs: Mapping[str, Any], compute: Callable[[], Found]
    ) -> Found:
        """One step of this model, kept in the store."""
        return self.store.result(f"{self.role}_{name}", step, {**self.inputs, **inputs}, compute)

    def test_prompts(self) -> PromptBatch:
        """Prompts that neither discovery nor the ablation has seen."""
        return self.prompts(self.settings.prompts, self.seed("faithfulness"), "testing")

    def prompts(self, n: int, seed: int, part: Part) -> PromptBatch:
        """Prompts of the task, or as many of them as there are."""
        return self.design.task.draw(self.tokenizer, n, seed=seed, part=part)

    def pairs(self, n: int, seed: int, part: Part) -> PairBatch:
        """Pairs of the task, or as many of them as there are."""
        return self.design.task.pairs(self.tokenizer, n, seed, part)

    def ablation(self, kind: AblationKind) -> Ablation:
        """An ablation from the corrupt prompts of other pairs."""
        if kind not in self._ablations:
            s, seed = self.settings, self.seed("ablation")
            others = self.pairs(s.prompts, seed, "ablation").corrupt
            self._ablations[kind] = make_ablation(
                self.model, others, kind, seed=seed, batch_size=self.batch_size
            )
        return self._ablations[kind]

    @property
    def ablation_kinds(self) -> tuple[AblationKind, ...]:
        """The ablation asked for, and the one that the task shows beside it."""
        kinds = (self.settings.ablation, self.design.task.beside)
        return tuple(dict.fromkeys(kind for kind in kinds if kind is not None))

    @property
    def judged_by_foil(self) -> bool:
        """Whether a prompt counts as answered right if its answer beats the foil: the recipe's
        metric compares these two."""
        recipe = self.design.recipe
        return recipe is not None and recipe.metric in OF_FOILS

    @property
    def batch_size(self) -> int:
        """Prompts run together outside path patching."""
        few = (self.model.cfg.n_params or SMALL_MODEL) < SMALL_MODEL
        return self.settings.batch_size or (SMALL_MODEL_BATCH if few else BATCH_SIZE)

    @property
    def how(self) -> dict[str, Any]:
        """How methods other than path patching are run."""
        s = self.settings
        return {"engine": s.engine, "batch_size": self.batch_size, "memory": s.memory_bytes}

    @property
    def tested_on(self) -> dict[str, Any]:
        """What decides the prompts of `test_prompts`, for the inputs of a step."""
        return {
            "prompts": self.settings.prompts,
            **self.design.task.inputs,
            "test": self.seed("faithfulness"),
        }

    def answered(self, pairs: PairBatch) -> Bool[Tensor, " batch"]:
        """Which clean prompts are answered right."""
        found = self.beats_foil(pairs) if self.judged_by_foil else self.evaluate(pairs.clean)
        return found.correct

    def beats_foil(self, pairs: PairBatch) -> Evaluation:
        """The model's answers, taken to be right where the target's logit is above its foil's."""
        found = self.evaluate(pairs.clean)
        right: list[Tensor] = []
        for chunk in pairs.chunks(self.batch_size):
            logits = answer_logits(self.model, chunk.clean.to(self.model.cfg.device or "cpu"))
            value = ANSWER_BEATS_FOIL.of_logits(logits, chunk.to(logits.device))
            right.append(value.bool().to(found.correct.device))
        return replace(found, correct=torch.cat(right))

    def evaluate(self, prompts: PromptBatch) -> Evaluation:
        """The model's answers."""
        return evaluate(self.model, prompts, **self.how)
