"""LoRA fine-tuning on skills other than the box task, with the box task measured along the way."""

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.models.bridge import transformers_model
from tl_entity.models.load import DTYPES, find_checkpoint, usable_device
from tl_entity.models.registry import registered
from tl_entity.models.tokenizers import replace_missing_padding
from tl_entity.output import check_writable, write_atomically
from tl_entity.stats import Interval, wilson_interval
from tl_entity.tasks.batches import PromptBatch
from tl_entity.tasks.boxes import mark_sentence, sample_prompts, usable_words
from tl_entity.tasks.marked import MarkedText, tokenize_marked
from tl_entity.training.measure import HELD_OUT_SEED
from tl_entity.training.skills import SKILLS, choose_kinds, skill_batch
from tl_entity.training.texts import IGNORED

RECORD, TIMES, UNFINISHED = "finetune.json", "times.json", "unfinished.safetensors"
"""Files in the output folder: what was done and found; how long it took; where to go on."""

SECONDS_AT_RISK = 30
"""A killed run loses at most so much work, and the step it was in."""

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a block that an adapter can change."""

_EVALUATION_BATCH = 10
_LONGEST_GRADIENT = 1.0


@checked
@dataclass(frozen=True)
class FinetuneSettings:
    """How an adapter is trained and watched.

    The loss is the mean over texts of each text's mean cross-entropy, so that a share in the mix is
    a share of the loss, however few tokens of a text are learned: in look-up and arithmetic the
    answers alone, since all before them is random; in stories every word, which keeps the model's
    manner of writing.

    Attributes:
        mix: kinds of text and their shares, as in `skills.SKILLS`.
        steps: how many optimiser steps (AdamW, constant learning rate, no weight decay).
        texts: how many texts a step.
        learning_rate: of AdamW.
        rank: of the adapter's matrices.
        alpha: the adapter's product is multiplied by alpha / rank; twice the rank if None.
        targets: the layers that get an adapter, of `LAYERS`.
        seed: for the adapter's first values and the texts.
        evaluate_every: steps between two evaluations on the box task; there is also one before the
            first step and one after the last.
        prompts: how many box prompts an evaluation takes, the same ones whatever the seed.
        boxes: how many boxes a prompt has.
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
                raise InputError(f"{kind!r} is no kind of text; there are {', '.join(SKILLS)}.")
            if not (math.isfinite(share) and share > 0):
                raise InputError(f"The share of {kind} is {share:g}; it must be above 0.")
        if not self.mix:
            raise InputError(f"The mix is empty; name kinds of text: {', '.join(SKILLS)}.")
        names = ("steps", "texts", "rank", "evaluate_every", "prompts", "boxes", "checkpoint_every")
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be above 0, not {value:g}.")
        for target in self.targets:
            if target not in LAYERS:
                raise InputError(f"{target!r} is no layer to adapt; there are {', '.join(LAYERS)}.")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise InputError("Name each layer to adapt once, and at least one.")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype} is none of {', '.join(DTYPES)}.")

    def to_json(self) -> dict[str, Any]:
        """As plain values, with what is left open filled in."""
        return {
            **dataclasses.asdict(self),
            "mix": dict(self.mix),
            "alpha": self.alpha or 2 * self.rank,
            "targets": sorted(self.targets),
        }


@checked
@dataclass(frozen=True)
class Evaluation:
    """The box task after some steps.

    Attributes:
        step: how many steps were done before.
        n: prompts.
        correct: those whose likeliest next token, of the whole vocabulary, is the answer.
        correct_among_objects: those whose answer is the likeliest of the prompt's own objects.
    """

    step: int
    n: int
    correct: int
    correct_among_objects: int

    @property
    def accuracy(self) -> float:
        """Over the whole vocabulary."""
        return self.correct / self.n

    @property
    def interval(self) -> Interval:
        """Of the accuracy, 95 %."""
        return wilson_interval(self.correct, self.n)

    @property
    def accuracy_among_objects(self) -> float:
        """With only the prompt's own objects to choose from."""
        return self.correct_among_objects / self.n

    @property
    def interval_among_objects(self) -> Interval:
        """Of the accuracy among objects, 95 %."""
        return wilson_interval(self.correct_among_objects, self.n)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **dataclasses.asdict(self),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "accuracy_among_objects": self.accuracy_among_objects,
            "interval_among_objects": list(self.interval_among_objects),
        }

    def __str__(self) -> str:
        return (
            f"step {self.step:>4}: {self.accuracy:.3f} {self.interval} of {self.n} box prompts, "
            f"{self.accuracy_among_objects:.3f} {self.interval_among_objects} among their objects"
        )


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

    Raises:
        InputError: if peft is not installed, the folder can't be written or holds a run of other
            settings, or the model can't be used for this.
    """
    settings = settings or FinetuneSettings()
    _check_peft()
    place = usable_device(device, 1)
    inputs = {
        "base": base_name or _name(base, gguf_file),
        "device": torch.device(place).type,
        **settings.to_json(),
    }
    check_writable(out)
    state = _State.read(out, inputs)
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
    replace_missing_padding(tokenizer, checkpoint.config.vocab_size)
    task = BoxTask.sample(tokenizer, settings.prompts, n_boxes=settings.boxes)
    longest: int = getattr(checkpoint.config, "max_position_embeddings", 1 << 30)
    if task.batch.tokens.shape[1] > longest:
        raise InputError(
            f"{checkpoint.place} takes {longest} tokens; prompts of {settings.boxes} boxes have "
            f"{task.batch.tokens.shape[1]}. Ask for fewer boxes."
        )
    _check_words(tokenizer, settings)
    model = transformers_model(checkpoint, None, DTYPES[settings.dtype], place)
    trainer = _Trainer(model, tokenizer, settings, inputs["base"], longest)
    if state.tensors:
        trainer.restore(state.tensors)
    out.mkdir(parents=True, exist_ok=True)
    progress(state.step, state.note)
    _run(trainer, task, settings, state, out, progress)
    return _finish(out, state)


def _run(
    trainer: "_Trainer",
    task: "BoxTask",
    settings: FinetuneSettings,
    state: "_State",
    out: Path,
    progress: Count,
) -> None:
    """All that is still to be done; what that is follows from the state alone."""
    clock = _Clock(state.seconds)

    def save() -> None:
        state.seconds = clock.seconds()
        state.write(out, trainer)
        clock.saved()

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == settings.steps

    while True:
        if due(settings.evaluate_every) and state.step not in state.evaluated:
            state.evaluations.append(task.evaluate(trainer.model, state.step))
            save()
            progress(0, state.note)
        if state.step and due(settings.checkpoint_every) and state.step not in state.checkpoints:
            trainer.save_adapter(out / _checkpoint_name(state.step))
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


def _finish(out: Path, state: "_State") -> Finetuned:
    (out / UNFINISHED).unlink(missing_ok=True)
    return Finetuned(
        folder=out,
        checkpoints={step: out / _checkpoint_name(step) for step in state.checkpoints},
        losses=tuple(state.losses),
        evaluations=tuple(state.evaluations),
    )


@checked
@dataclass(frozen=True)
class BoxTask:
    """Box prompts to measure a model of transformers on.

    Attributes:
        batch: the prompts.
        objects: token ids of the objects in each prompt.
    """

    batch: PromptBatch
    objects: Int[Tensor, "batch boxes"]

    @classmethod
    def sample(cls, tokenizer: PreTrainedTokenizerBase, n: int, *, n_boxes: int) -> "BoxTask":
        """Prompts from a seed that no training uses, always the same for one tokenizer.

        Raises:
            InputError: if the tokenizer has too few one-token objects or labels.
        """
        objects, labels = usable_words(tokenizer)
        prompts = sample_prompts(
            n, n_boxes=n_boxes, seed=HELD_OUT_SEED + n_boxes, objects=objects, labels=labels
        )
        batch = tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], tokenizer)
        words = sorted({word for prompt in prompts for word in prompt.objects})
        # As answers are: the token of the word where it follows another and a space.
        answers = tokenize_marked([MarkedText("the", {}, word) for word in words], tokenizer)
        ids = dict(zip(words, answers.answers.tolist(), strict=True))
        return cls(batch, torch.tensor([[ids[word] for word in p.objects] for p in prompts]))

    @checked
    def evaluate(self, model: nn.Module, step: int = 0) -> Evaluation:
        """How many prompts the model answers right."""
        logits = self.answer_logits(model)
        rows = torch.arange(len(logits))
        among = self.objects[rows, logits.gather(1, self.objects).argmax(1)]
        return Evaluation(
            step,
            n=len(logits),
            correct=int((logits.argmax(1) == self.batch.answers).sum()),
            correct_among_objects=int((among == self.batch.answers).sum()),
        )

    @checked
    def answer_logits(self, model: nn.Module) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the end of each prompt, on the CPU."""
        network: Any = model
        with torch.no_grad():
            # Few at a time, since attention patterns are held whole.
            return torch.cat(
                [
                    _logits_at(
                        network,
                        chunk.tokens,
                        torch.arange(chunk.tokens.shape[1]) == chunk.positions["last"][:, None],
                    )
                    .float()
                    .cpu()
                    for chunk in self.batch.chunks(_EVALUATION_BATCH)
                ]
            )


class _Trainer:
    """The model with its adapter, and the optimiser."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: FinetuneSettings,
        base_name: str,
        longest: int,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self._tokenizer, self._settings, self._longest = tokenizer, settings, longest
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha or 2 * settings.rank,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=list(settings.targets),
        )
        network: Any = model
        network.name_or_path = base_name  # which peft writes down
        # The adapter's first values come from torch's own generator, which is put back afterwards.
        devices = [network.device] if network.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            self._adapted: Any = get_peft_model(network, config)
        # Without dropout nothing differs in training mode.
        self._adapted.eval()
        self.model: nn.Module = self._adapted.get_base_model()
        self._parameters = {
            name: parameter
            for name, parameter in self._adapted.named_parameters()
            if parameter.requires_grad
        }
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=settings.learning_rate, weight_decay=0.0
        )

    def step(self, step: int) -> tuple[float, dict[str, float]]:
        """One step on texts that follow from the seed and the step's number.

        Returns:
            The loss, and that of each kind of text that was there.

        Raises:
            InputError: if the loss is no number any more, or a text is too long for the model.
        """
        generator = random.Random(f"finetune {self._settings.seed} {step}")
        kinds = choose_kinds(self._settings.mix, self._settings.texts, generator)
        tokens, targets = skill_batch(self._tokenizer, kinds, generator)
        if tokens.shape[1] > self._longest:
            raise InputError(
                f"A text has {tokens.shape[1]} tokens; the model takes {self._longest}."
            )
        losses = _text_losses(self.model, tokens, targets)
        loss = losses.mean()
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"The loss at step {step} is {value}; train with a lower learning rate."
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), _LONGEST_GRADIENT)
        self._optimizer.step()
        each = losses.detach().tolist()
        by_kind = {
            kind: _mean([one for one, other in zip(each, kinds, strict=True) if other == kind])
            for kind in self._settings.mix
            if kind in kinds
        }
        return value, by_kind

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as peft does; the folder is there whole or not at all."""
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        self._adapted.save_pretrained(part, save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # an empty form
        file = part / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        # A set, which peft writes in an order that differs from process to process.
        config["target_modules"] = sorted(config["target_modules"])
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter and what the optimiser remembers of each of its parameters."""
        held = {}
        for name, parameter in self._parameters.items():
            held[f"adapter {name}"] = parameter
            for key, value in self._optimizer.state[parameter].items():
                held[f"{key} {name}"] = value
        return {key: value.detach().cpu().contiguous() for key, value in held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            InputError: if they are of another model.
        """
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                kept = tensors.get(f"adapter {name}")
                if kept is None or kept.shape != parameter.shape:
                    raise InputError(
                        f"{UNFINISHED} is of another model: it has no {name} of this shape."
                    )
                parameter.copy_(kept)
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key} {name}" in tensors:
                        value = tensors[f"{key} {name}"]
                        # The optimiser counts on the CPU.
                        held = value if key == "step" else value.to(parameter.device)
                        self._optimizer.state[parameter][key] = held.clone()


@dataclass
class _State:
    """Where a run is; the one thing here that changes.

    Attributes:
        inputs: everything that the outcome depends on, as plain values.
        step: how many steps are done.
        checkpoints: the steps whose adapters are written.
        tensors: those of the trainer, as they were read.
        seconds: how long it has taken so far.
    """

    inputs: Mapping[str, Any]
    step: int = 0
    is_finished: bool = False
    losses: list[float] = field(default_factory=list)
    losses_by_kind: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def evaluated(self) -> list[int]:
        """The steps after which the box task was measured."""
        return [evaluation.step for evaluation in self.evaluations]

    @property
    def note(self) -> str:
        """The last loss and accuracy, for a progress bar."""
        parts = []
        if self.losses:
            parts.append(f"loss {self.losses[-1]:.3f}")
        if self.evaluations:
            parts.append(f"boxes {self.evaluations[-1].accuracy:.3f}")
        return ", ".join(parts)

    @classmethod
    def read(cls, out: Path, inputs: Mapping[str, Any]) -> "_State":
        """What the folder holds of a run with these inputs; a new state if nothing.

        Raises:
            InputError: if it holds a run with other inputs, or can't be read.
        """
        try:
            record = json.loads((out / RECORD).read_text(encoding="utf-8"))
            _refuse_other_inputs(out, record["settings"], inputs)
            if record["finished"]:
                for step in record["checkpoints"]:
                    if not (out / _checkpoint_name(step)).is_dir():
                        raise InputError(
                            f"{out} lacks {_checkpoint_name(step)}, which its {RECORD} names; "
                            f"remove {RECORD} to train again."
                        )
                return cls._of(inputs, record, {}, 0.0)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{out / RECORD} can't be read; remove it, or give another folder."
            ) from None
        file = out / UNFINISHED
        if not file.is_file():
            return cls(inputs)
        try:
            with safe_open(file, framework="pt") as opened:
                content = json.loads(opened.metadata()["state"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            _refuse_other_inputs(out, content["settings"], inputs)
            return cls._of(inputs, content, tensors, content["seconds"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is damaged; remove it to begin anew.") from None

    @classmethod
    def _of(
        cls,
        inputs: Mapping[str, Any],
        content: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        seconds: float,
    ) -> "_State":
        names = {each.name for each in dataclasses.fields(Evaluation)}
        evaluations = [
            Evaluation(**{name: value for name, value in given.items() if name in names})
            for given in content["evaluations"]
        ]
        return cls(
            inputs,
            step=content["step"],
            is_finished=content["finished"],
            losses=content["losses"],
            losses_by_kind=content["losses_by_kind"],
            evaluations=evaluations,
            checkpoints=content["checkpoints"],
            tensors=tensors,
            seconds=seconds,
        )

    def write(self, out: Path, trainer: _Trainer) -> None:
        """Keep the state so that `read` finds it, and the record for people."""
        content = {
            "settings": self.inputs,
            "step": self.step,
            "finished": self.is_finished,
            "losses": self.losses,
            "losses_by_kind": self.losses_by_kind,
            "evaluations": [evaluation.to_json() for evaluation in self.evaluations],
            "checkpoints": self.checkpoints,
        }
        header = {"state": json.dumps({**content, "seconds": self.seconds})}
        # The record vouches for a finished run, so the state comes first.
        write_atomically(out / UNFINISHED, tensors_to_bytes(trainer.tensors(), header))
        write_atomically(out / TIMES, json.dumps({"seconds": round(self.seconds, 1)}) + "\n")
        record = {**content, "versions": _versions()}
        write_atomically(out / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


class _Clock:
    """How long a run has taken, earlier calls included, and when it was last kept."""

    def __init__(self, before: float) -> None:
        self._start = self._last = time.monotonic()
        self._before = before

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def since_saved(self) -> float:
        return time.monotonic() - self._last

    def saved(self) -> None:
        self._last = time.monotonic()


@checked
def _text_losses(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The mean cross-entropy of each text over the tokens that are learned."""
    network: Any = model
    learned = targets != IGNORED
    logits = _logits_at(network, tokens, learned).float()
    wanted = targets[learned].to(logits.device)
    losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
    texts = learned.nonzero()[:, 0].to(logits.device)
    sums = torch.zeros(len(tokens), device=logits.device).index_add(0, texts, losses)
    return sums / learned.sum(1).to(logits.device)


def _logits_at(network: Any, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Logits at the tokens wanted: of a large vocabulary, far cheaper than those at all tokens.

    Padding stands on the right, where a causal model does not look: no mask is needed.
    """
    hidden = network.get_decoder()(tokens.to(network.device), use_cache=False).last_hidden_state
    return network.get_output_embeddings()(hidden[wanted.to(hidden.device)])


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise InputError("Fine-tuning needs peft, which is not installed: pip install peft.")


def _check_words(tokenizer: PreTrainedTokenizerBase, settings: FinetuneSettings) -> None:
    """A look at some texts, so that a model that can't be trained is refused before any work."""
    generator = random.Random(f"words {settings.seed}")
    for kind in settings.mix:
        skill_batch(tokenizer, [kind] * 20, generator)


def _refuse_other_inputs(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(here))
    differing = [key for key in plain if there.get(key) != plain[key]]
    if differing:
        said = ", ".join(
            f"{key} {json.dumps(there.get(key))} and not {json.dumps(plain[key])}"
            for key in differing
        )
        raise InputError(f"{out} holds a run with {said}; give another folder.")


def _name(base: str | Path, gguf_file: str | None) -> str:
    path = Path(base).expanduser()
    # A path of one machine tells others nothing.
    name = path.resolve().name if path.exists() else str(base)
    return f"{name}/{gguf_file}" if gguf_file else name


def _checkpoint_name(step: int) -> str:
    return f"step-{step:04d}"


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tl_entity", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "(not installed)"
    return found


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
