"""The output folder as a store: every finished step is kept, and found again by its inputs."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from tl_entity.output import check_writable, write_atomically
from tl_entity.ranks import from_first, is_first

Record = dict[str, Any]
"""What a step found: plain JSON."""

Outcome = tuple[Record, dict[str, Tensor]]
"""A step's record and its tensors."""

INFINITE = "infinite"
"""Stands for infinity in a record."""

RESULTS, REPORT, TIMINGS, STEPS = "results.json", "report.html", "timings.json", "steps"


def with_circuit(models: Mapping[str, Record]) -> dict[str, Record]:
    """The models that a circuit was looked for in, by role, of those in results.json."""
    return {role: model for role, model in models.items() if model["no_circuit"] is None}


def to_json(content: object) -> str:
    """JSON with sorted keys and a line for each entry but the innermost lists; NaN becomes null."""
    return _indented(_plain(content), 0) + "\n"


def fingerprint(content: object) -> str:
    """A hash of plain content, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()


def number_record(number: float) -> float | str:
    """A number that may be infinite, for which JSON has none."""
    return INFINITE if number == math.inf else number


def read_number(recorded: float | str | None) -> float:
    """What `number_record` wrote; NaN for what became null."""
    if recorded is None:
        return math.nan
    return math.inf if recorded == INFINITE else float(recorded)


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

    def step(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Outcome]) -> Outcome:
        """What `compute` finds, taken from the folder if it was found from the same inputs before.

        Args:
            name: of the step, and of its files.
            inputs: everything that the outcome depends on, as plain values.
            compute: does the work.
        """
        key = fingerprint({"step": name, **inputs})
        # Of several processes the first one reads and writes, so that all go the same way.
        found = from_first(lambda: self._find(name, key))
        if found is not None:
            self._log(f"{name}: found finished")
            return found
        start = time.perf_counter()
        record, tensors = compute()
        seconds = time.perf_counter() - start
        self._log(f"{name}: {seconds:.1f} s")
        return from_first(lambda: self._keep(name, key, record, tensors, seconds))

    def _keep(
        self, name: str, key: str, record: Record, tensors: dict[str, Tensor], seconds: float
    ) -> Outcome:
        # What was made from the step's earlier outcome no longer holds.
        for derived in (RESULTS, REPORT):
            (self.folder / derived).unlink(missing_ok=True)
        self._note_time(name, seconds)
        data = tensors_to_bytes({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
        content = {
            "key": key,
            "tensors": hashlib.sha256(data).hexdigest() if tensors else None,
            "record": record,
        }
        # The record comes last: it vouches for the tensors.
        if tensors:
            write_atomically(self._steps / f"{name}.safetensors", data)
        write_atomically(self._steps / f"{name}.json", to_json(content))
        found = self._find(name, key)
        if found is None:
            raise OSError(f"{self._steps / name} could not be read back.")
        return found

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file below the folder; of several processes only the first one does."""
        path = self.folder / name
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        return path

    def _find(self, name: str, key: str) -> Outcome | None:
        try:
            content = json.loads((self._steps / f"{name}.json").read_text(encoding="utf-8"))
            if content["key"] != key:
                return None
            if content["tensors"] is None:
                return content["record"], {}
            data = (self._steps / f"{name}.safetensors").read_bytes()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if hashlib.sha256(data).hexdigest() != content["tensors"]:
            return None
        return content["record"], load_tensors(data)

    def _note_time(self, name: str, seconds: float) -> None:
        # Apart from the results, which are the same bytes however long they took.
        path = self.folder / TIMINGS
        try:
            times = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            times = {}
        write_atomically(path, to_json({**times, name: round(seconds, 3)}))


def _plain(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return content


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
