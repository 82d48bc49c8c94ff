"""The output folder as a store: every finished step is kept, and found again by its inputs."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxtyping import Shaped
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.output import check_writable, write_atomically
from tl_entity.ranks import from_first, is_first
from tl_entity.results import FORMAT, Result, pack, plain, read_header

Record = dict[str, Any]
"""Plain JSON."""

Outcome = tuple[Record, dict[str, Tensor]]
"""A record and tensors."""

RESULTS, REPORT, TIMINGS, STEPS = "results.json", "report.html", "timings.json", "steps"

Found = TypeVar("Found", bound=Result)


@dataclass(frozen=True)
class Step(Generic[Found]):
    """What a kind of step gives.

    Attributes:
        kind: the class of the result.
        version: raised when the same inputs give other numbers than before. Nothing else that is
            changed in this program makes a finished step be done again.
    """

    kind: type[Found]
    version: int = 1


@dataclass(frozen=True)
class Noted(Result):
    """A record and tensors, for steps that no method has a class for.

    Attributes:
        text: the record as JSON.
        tensors: the tensors.
    """

    text: str
    tensors: Mapping[str, Shaped[Tensor, "..."]]


def with_circuit(models: Mapping[str, Record]) -> dict[str, Record]:
    """The models that a circuit was looked for in, by role, of those in results.json."""
    return {role: model for role, model in models.items() if model["no_circuit"] is None}


def to_json(content: object) -> str:
    """JSON with sorted keys and a line for each entry but the innermost lists; NaN becomes null."""
    return _indented(plain(content), 0) + "\n"


def fingerprint(content: object) -> str:
    """A hash of plain content, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> Record:
    """A JSON file that holds an object; an empty one where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class Store:
    """Finished steps in a folder.

    Args:
        folder: the folder; made if it is not there.
        log: told of each step, how long it took or that it was found finished.

    Raises:
        InputError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path, log: Callable[[str], object] = lambda message: None) -> None:
        check_writable(folder)
        self.folder = folder
        self._log = log
        self._steps = folder / STEPS
        self._steps.mkdir(parents=True, exist_ok=True)

    def result(
        self, name: str, step: Step[Found], inputs: Mapping[str, Any], compute: Callable[[], Found]
    ) -> Found:
        """What `compute` gives, taken from the folder if it was found from the same inputs before.

        Args:
            name: of the step, and of its file.
            step: what it gives.
            inputs: everything that the result depends on, as plain values.
            compute: does the work.
        """
        key = fingerprint({"step": name, "version": step.version, **inputs})
        # Of several processes the first one reads and writes, so that all go the same way.
        found = from_first(lambda: self._find(name, step.kind, key))
        if found is not None:
            self._log(f"{name}: found finished")
            return found
        start = time.perf_counter()
        computed = compute()
        seconds = time.perf_counter() - start
        self._log(f"{name}: {seconds:.1f} s")
        return from_first(lambda: self._keep(name, step.kind, key, computed, seconds))

    def step(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Outcome]) -> Outcome:
        """The same for a plain record and tensors."""

        def noted() -> Noted:
            record, tensors = compute()
            return Noted(json.dumps(plain(record)), tensors)

        found = self.result(name, Step(Noted), inputs, noted)
        return json.loads(found.text), dict(found.tensors)

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file below the folder; of several processes only the first one does."""
        path = self.folder / name
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        return path

    def _keep(self, name: str, kind: type[Found], key: str, found: Found, seconds: float) -> Found:
        write_atomically(self._path(name), pack(found, key=key))
        # Apart from the results, which are the same bytes however long they took.
        times = read_record(self.folder / TIMINGS)
        write_atomically(self.folder / TIMINGS, to_json({**times, name: round(seconds, 3)}))
        return kind.load(self._path(name))

    def _find(self, name: str, kind: type[Found], key: str) -> Found | None:
        path = self._path(name)
        try:
            header = read_header(path)
            # Files of before are read without a hash, and a step is not believed without one.
            if (header.get("format"), header.get("key")) != (FORMAT, key):
                return None
            return kind.load(path)
        except InputError:
            return None

    def _path(self, name: str) -> Path:
        return self._steps / f"{name}.safetensors"


def _indented(content: object, depth: int) -> str:
    inner, outer = "  " * (depth + 1), "  " * depth
    if isinstance(content, dict) and content:
        entries = [
            f"{inner}{json.dumps(key)}: {_indented(content[key], depth + 1)}"
            for key in sorted(content)
        ]
        return "{\n" + ",\n".join(entries) + f"\n{outer}}}"
    if isinstance(content, list) and any(isinstance(entry, dict) for entry in content):
        return (
            "[\n"
            + ",\n".join(f"{inner}{_indented(entry, depth + 1)}" for entry in content)
            + f"\n{outer}]"
        )
    return json.dumps(content, allow_nan=False)
