"""A plan: what each job computes, and what it takes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tl_entity.planning.machine import Machine

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PlannedJob:
    """What one job takes on the exact engine.

    Attributes:
        name: the job.
        operations: floating-point operations of matrix products, by part of the work.
        cache_bytes: recorded activations, the most there are at a time.
        chunk_bytes: what the most memory is beyond these.
        hooks_passes: runs of all prompts that plain hooks need for the same numbers; 0 where that
            is not known.
        hooks_operations: the operations of these.
        seconds: of the processor that it is likely to take here, which is how long it takes on a
            machine that does nothing else; None without a calibration.
    """

    name: str
    operations: Mapping[str, int]
    cache_bytes: int
    chunk_bytes: int
    hooks_passes: int
    hooks_operations: int
    seconds: float | None

    @property
    def total_operations(self) -> int:
        """Floating-point operations of all parts."""
        return sum(self.operations.values())


@dataclass(frozen=True)
class Plan:
    """What some jobs take, each by itself.

    Attributes:
        jobs: in the order they were given.
        n_prompts: prompts, or pairs of them.
        n_tokens: tokens of the longest.
        parameters: numbers in the model's weights.
        weight_bytes: their memory.
        dtype: their type.
        machine: what the calibration found; None without one.
    """

    jobs: tuple[PlannedJob, ...]
    n_prompts: int
    n_tokens: int
    parameters: int
    weight_bytes: int
    dtype: str
    machine: Machine | None

    def __getitem__(self, name: str) -> PlannedJob:
        """The job of this name.

        Raises:
            KeyError: if there is none.
        """
        for job in self.jobs:
            if job.name == name:
                return job
        raise KeyError(name)

    def __str__(self) -> str:
        operations = sum(job.total_operations for job in self.jobs)
        text = f"{len(self.jobs)} jobs, {operations:.3g} operations, {self.peak_bytes:.3g} bytes"
        return text if self.seconds is None else f"{text}, about {self.seconds:.3g} s"

    @property
    def seconds(self) -> float | None:
        """All jobs one after another."""
        if self.machine is None:
            return None
        return sum(job.seconds or 0.0 for job in self.jobs)

    @property
    def peak_bytes(self) -> int:
        """Weights, and the most that any job needs beside them."""
        return self.weight_bytes + max(
            (job.cache_bytes + job.chunk_bytes for job in self.jobs), default=0
        )

    def table(self) -> list[str]:
        """The plan for people to read, line by line."""
        machine = self.machine
        where = "" if machine is None else f", {machine.device}, {machine.threads} threads"
        total = sum(job.total_operations for job in self.jobs)
        names = [job.name for job in self.jobs] + ["all, one after another"]
        width = max(map(len, names))
        lines = [
            f"{self.n_prompts} prompts of up to {self.n_tokens} tokens; "
            f"{self.parameters / 1e6:,.1f} million weights, {self.dtype}{where}",
            f"{'':<{width}}  {'GFLOP':>12}  {'MiB':>8}  {'hook runs':>9}  {'of hooks':>8}  seconds",
        ]
        for job in self.jobs:
            share = "-"
            if job.hooks_operations:
                share = f"{job.total_operations / job.hooks_operations:.2%}"
            lines.append(
                f"{job.name:<{width}}  {job.total_operations / 1e9:>12,.1f}  "
                f"{(job.cache_bytes + job.chunk_bytes) / 2**20:>8,.0f}  {job.hooks_passes:>9,}  "
                f"{share:>8}  {_seconds(job.seconds)}"
            )
        lines.append(
            f"{names[-1]:<{width}}  {total / 1e9:>12,.1f}  {self.peak_bytes / 2**20:>8,.0f}  "
            f"{sum(job.hooks_passes for job in self.jobs):>9,}  {'':>8}  {_seconds(self.seconds)}"
        )
        return [
            *lines,
            "GFLOP: operations of matrix products, exact engine. MiB: activations; in the last "
            "line with the weights. Hook runs: runs of all prompts that plain hooks need; of "
            "hooks: the exact engine's operations as a share of theirs.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and texts, for JSON."""
        machine = self.machine
        return {
            "n_prompts": self.n_prompts,
            "n_tokens": self.n_tokens,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "jobs": [
                {**asdict(job), "total_operations": job.total_operations} for job in self.jobs
            ],
            "machine": machine
            and {
                "device": machine.device,
                "threads": machine.threads,
                "bytes_per_second": machine.bytes_per_second,
                "call_seconds": machine.call_seconds,
                "matmul": [
                    {**shape._asdict(), "flop_per_second": rate}
                    for shape, rate in machine.rates.items()
                ],
            },
        }

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a job."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "job": job.name,
                    "operations": job.total_operations,
                    "cache_bytes": job.cache_bytes,
                    "chunk_bytes": job.chunk_bytes,
                    "hooks_passes": job.hooks_passes,
                    "hooks_operations": job.hooks_operations,
                    "seconds": job.seconds,
                }
                for job in self.jobs
            ]
        )


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.2f}" if seconds < 100 else f"{seconds:,.0f}"
