"""Where a fine-tune is, kept so that a killed run goes on to the same bytes."""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.output import write_atomically
from tl_entity.reading import parse_json
from tl_entity.training.box_task import Evaluation

RECORD, TIMES, UNFINISHED = "finetune.json", "times.json", "unfinished.safetensors"
"""Files in the output folder: what was done and found; how long it took; where to go on."""


@dataclass
class FinetuneState:
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
    def read(cls, out: Path, inputs: Mapping[str, Any]) -> "FinetuneState":
        """What the folder holds of a run with these inputs; a new state if nothing.

        Raises:
            InputError: if it holds a run with other inputs, or can't be read.
        """
        try:
            record = _read_record(out / RECORD)
            _refuse_other_inputs(out, record["settings"], inputs)
            if record["finished"]:
                for step in record["checkpoints"]:
                    if not (out / checkpoint_name(step)).is_dir():
                        raise InputError(
                            f"{out} lacks {checkpoint_name(step)}, which its {RECORD} names; "
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
                content = _plain(opened.metadata()["state"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            _refuse_other_inputs(out, content["settings"], inputs)
            return cls._of(inputs, content, tensors, content["seconds"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    ) -> "FinetuneState":
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

    def write(self, out: Path, tensors: Mapping[str, Tensor]) -> None:
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
        write_atomically(out / UNFINISHED, tensors_to_bytes(dict(tensors), header))
        write_atomically(out / TIMES, json.dumps({"seconds": round(self.seconds, 1)}) + "\n")
        record = {**content, "versions": _versions()}
        write_atomically(out / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


class Clock:
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


def _read_record(file: Path) -> Any:
    """What the record says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    if not file.exists():
        raise FileNotFoundError(file)
    return _plain(file.read_text(encoding="utf-8")) if file.is_file() else _plain("")


def _plain(text: str) -> Any:
    try:
        return parse_json(text, "the state")
    except InputError as error:  # which would not say what to do about it
        raise ValueError(str(error)) from None


def checkpoint_name(step: int) -> str:
    return f"step-{step:04d}"


def _refuse_other_inputs(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(here))
    differing = [key for key in plain if there.get(key) != plain[key]]
    if differing:
        said = ", ".join(
            f"{key} {json.dumps(there.get(key))} and not {json.dumps(plain[key])}"
            for key in differing
        )
        raise InputError(f"{out} holds a run with {said}; give another folder.")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tl_entity", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "(not installed)"
    return found
