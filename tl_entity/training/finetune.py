"""LoRA fine-tuning on skills other than the box task, with the box task measured along the way."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.models.bridge import transformers_model
from tl_entity.models.load import DTYPES, find_checkpoint, usable_device
from tl_entity.models.registry import registered
from tl_entity.models.tokenizers import fit_to_vocabulary
from tl_entity.output import sole_worker
from tl_entity.training.adapter import AdapterTrainer
from tl_entity.training.box_task import BoxTask, Evaluation
from tl_entity.training.finetune_settings import FinetuneSettings
from tl_entity.training.finetune_state import UNFINISHED, Clock, FinetuneState, checkpoint_name
from tl_entity.training.skills import skill_batch

SECONDS_AT_RISK = 30
"""A killed run loses at most so much work, and the step it was in."""


@checked
@dataclass(frozen=True)
class Finetuned:
    """A finished fine-tune.

    Attributes:
        folder: where it is.
        checkpoints: the adapters kept, by the number of steps done.
        losses: of every step.
        evaluations: on the box task.
    """

    folder: Path
    checkpoints: Mapping[int, Path]
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def adapter(self) -> Path:
        """The last adapter; `load_model(base, adapter=...)` takes it."""
        return self.checkpoints[max(self.checkpoints)]


Count = Callable[[int, str], object]
"""Told how many more steps are done, and a note on how it goes."""


@checked
def finetune(
    base: str | Path,
    out: Path,
    settings: FinetuneSettings | None = None,
    *,
    base_name: str | None = None,
    gguf_file: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Count = lambda steps, note: None,
    wait: bool = False,
) -> Finetuned:
    """Train a LoRA adapter on texts without boxes, and measure the box task along the way.

    Writes `step-0020/` and so on, adapters as peft writes them, and `finetune.json`: settings,
    versions, losses, evaluations. How long it took is in `times.json`. What is done is kept: the
    same call goes on where the last one was stopped, even by a kill, and ends with the same bytes
    (on the same machine, with the same number of threads and releases of the libraries).

    Args:
        base: the model, as for `load_model`.
        out: the folder.
        settings: how to train.
        base_name: what the adapter says it belongs to; by default `base`, or of a folder or file
            on this machine its name alone.
        gguf_file: as for `load_model`. Quantised numbers are decoded.
        device: such as "cpu" or "cuda"; CUDA where there is one if left out.
        revision: as for `load_model`.
        token: as for `load_model`.
        local_files_only: as for `load_model`.
        progress: told of finished steps, those of an earlier call included.
        wait: wait for another process that works in the folder, instead of giving up.

    Raises:
        InputError: if peft is not installed, the folder can't be written, holds a run of other
            settings or is being worked in by another process, or the model can't be used for this.
    """
    settings = settings or FinetuneSettings()
    _check_peft()
    place = usable_device(device, 1)
    inputs = {
        "base": base_name or _name(base, gguf_file),
        "device": torch.device(place).type,
        **settings.to_json(),
    }
    with sole_worker(out, wait=wait):
        state = FinetuneState.read(out, inputs)
        if state.is_finished:
            progress(state.step, state.note)
            return _finish(out, state)
        entry = registered(base)
        if entry is not None and entry.adapter is not None:
            raise InputError(
                f"{base} is a base with an adapter of its own; merge the two and give the folder."
            )
        access = {"revision": revision, "token": token, "local_files_only": local_files_only}
        checkpoint = find_checkpoint(base, gguf_file, **access)
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise InputError(f"{checkpoint.place} has no tokenizer, and texts need one.")
        fit_to_vocabulary(
            tokenizer, checkpoint.config.vocab_size, f"The tokenizer of {checkpoint.place}"
        )
        task = BoxTask.sample(tokenizer, settings.prompts, n_boxes=settings.boxes)
        longest: int = getattr(checkpoint.config, "max_position_embeddings", 1 << 30)
        if task.batch.tokens.shape[1] > longest:
            raise InputError(
                f"{checkpoint.place} takes {longest} tokens; prompts of {settings.boxes} boxes "
                f"have {task.batch.tokens.shape[1]}. Ask for fewer boxes."
            )
        _check_words(tokenizer, settings)
        model = transformers_model(checkpoint, None, DTYPES[settings.dtype], place)
        trainer = AdapterTrainer(model, tokenizer, settings, inputs["base"], longest)
        if state.tensors:
            trainer.restore(state.tensors)
        progress(state.step, state.note)
        _run(trainer, task, settings, state, out, progress)
        return _finish(out, state)


def _run(
    trainer: AdapterTrainer,
    task: BoxTask,
    settings: FinetuneSettings,
    state: FinetuneState,
    out: Path,
    progress: Count,
) -> None:
    """All that is still to be done; what that is follows from the state alone."""
    clock = Clock(state.seconds)

    def save() -> None:
        state.seconds = clock.seconds()
        state.write(out, trainer.tensors())
        clock.saved()

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == settings.steps

    while True:
        if due(settings.evaluate_every) and state.step not in state.evaluated:
            state.evaluations.append(task.evaluate(trainer.model, state.step))
            save()
            progress(0, state.note)
        if state.step and due(settings.checkpoint_every) and state.step not in state.checkpoints:
            trainer.save_adapter(out / checkpoint_name(state.step))
            state.checkpoints.append(state.step)
            save()
        if state.step == settings.steps:
            break
        loss, by_kind = trainer.step(state.step)
        state.step += 1
        state.losses.append(loss)
        state.losses_by_kind.append(by_kind)
        # An evaluation can take minutes: what it rests on is kept first.
        if clock.since_saved() > SECONDS_AT_RISK or due(settings.evaluate_every):
            save()
        progress(1, state.note)
    state.is_finished = True
    save()


def _finish(out: Path, state: FinetuneState) -> Finetuned:
    (out / UNFINISHED).unlink(missing_ok=True)
    return Finetuned(
        folder=out,
        checkpoints={step: out / checkpoint_name(step) for step in state.checkpoints},
        losses=tuple(state.losses),
        evaluations=tuple(state.evaluations),
    )


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise InputError("Fine-tuning needs peft, which is not installed: pip install peft.")


def _check_words(tokenizer: PreTrainedTokenizerBase, settings: FinetuneSettings) -> None:
    """A look at some texts, so that a model that can't be trained is refused before any work."""
    generator = random.Random(f"words {settings.seed}")
    for kind in settings.mix:
        skill_batch(tokenizer, [kind] * 20, generator)


def _name(base: str | Path, gguf_file: str | None) -> str:
    path = Path(base).expanduser()
    # A path of one machine tells others nothing.
    name = path.resolve().name if path.exists() else str(base)
    return f"{name}/{gguf_file}" if gguf_file else name
