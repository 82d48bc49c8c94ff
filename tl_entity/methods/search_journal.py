"""A search that was cut off goes on where it was: what it ran is kept, step by step.

A search does the same in the same order whenever it is given the same. So every run of the model is
kept in a file of its own, numbered, and a search that begins again is answered from the files as
far as they go.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gains import scored_pairs
from tl_entity.methods.gated_forward import GatedForward, Loss, NodesEvaluation, RecordedPrompts
from tl_entity.methods.masked_forward import outside_inference
from tl_entity.output import check_writable, write_atomically
from tl_entity.ranks import from_first, is_first, n_ranks
from tl_entity.results import Result, pack, read_header
from tl_entity.tasks.batches import PairBatch, PromptBatch
from tl_entity.tasks.fingerprint import fingerprint

SUFFIX = ".step.safetensors"

SomeResult = TypeVar("SomeResult", bound=Result)


@checked
@dataclass(frozen=True)
class Gradient(Result):
    """A loss and its gradient with respect to all gates."""

    loss: float
    values: Float[Tensor, " node"]


@checked
@dataclass(frozen=True)
class Recorded(Result):
    """What the whole model answers."""

    whole: Float[Tensor, "batch logits"]


@dataclass(frozen=True)
class Evaluated(Result):
    """How prompts are answered with each of some gates."""

    answers: tuple[NodesEvaluation, ...]


@dataclass
class Journal:
    """What a search has run, in order.

    Attributes:
        folder: where it is kept.
        search: a hash of all that the search depends on.
        known: what earlier runs of the same search have kept.
        n_done: how many runs of the model were made, or answered from what is kept.
    """

    folder: Path
    search: str
    known: list[Path] = field(default_factory=list[Path])
    n_done: int = 0

    @classmethod
    def open(cls, folder: str | Path, depends_on: Sequence[str]) -> "Journal":
        """The journal of a search that depends on these; a new one if the folder has none.

        Raises:
            InputError: if the folder can't be written to, or has the journal of another search.
        """
        folder = Path(folder)
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(folder, _hash(*depends_on))
        known = sorted(folder.glob(f"*{SUFFIX}"))
        # Without a gap: a file that is there was written whole.
        for i, path in enumerate(known):
            if path.name != journal.path(i).name:
                raise InputError(
                    f"{folder} lacks {journal.path(i).name}, which comes before others."
                )
        if known and read_header(known[0]).get("search") != journal.search:
            raise InputError(
                f"{folder} has steps of another search, of another model, prompts or settings; "
                "give a folder of its own."
            )
        journal.known = known
        return journal

    def path(self, number: int) -> Path:
        """Where the run of this number is kept."""
        return self.folder / f"{number:05d}{SUFFIX}"

    def kept(self, kind: type[SomeResult], of: str, run: Callable[[], SomeResult]) -> SomeResult:
        """What is kept of the next run of the model, or what it gives if nothing is.

        Args:
            kind: class of the result.
            of: says what is run.
            run: runs it.

        Raises:
            InputError: if what is kept is of another run.
        """
        number, self.n_done = self.n_done, self.n_done + 1
        if number < len(self.known):
            path = self.known[number]
            if read_header(path).get("of") != of:
                raise InputError(
                    f"{path} is not what this search runs there: it was made by another version or "
                    "on another kind of machine; remove the folder to begin anew."
                )
            return kind.load(path)
        found = run()
        if is_first():
            write_atomically(self.path(number), pack(found, search=self.search, of=of))
        return found


@dataclass(frozen=True)
class KeptForward(GatedForward):
    """A model with gates whose every run is kept.

    Attributes:
        journal: where.
    """

    journal: Journal

    @classmethod
    def keeping(cls, forward: GatedForward, journal: Journal) -> "KeptForward":
        """The same model with a journal."""
        fields = {name: getattr(forward, name) for name in GatedForward.__dataclass_fields__}
        return cls(**fields, journal=journal)

    def record(self, prompts: PromptBatch | PairBatch) -> RecordedPrompts:
        """As `GatedForward.record`."""
        run: list[RecordedPrompts] = []

        def compute() -> Recorded:
            run.append(super(KeptForward, self).record(prompts))
            return Recorded(run[0].whole)

        of = _hash("record", fingerprint(prompts))
        kept = self.journal.kept(Recorded, of, compute)
        if run:
            return run[0]
        pairs = outside_inference(scored_pairs(self.model, prompts))
        return RecordedPrompts(pairs, kept.whole.to(pairs.clean.tokens.device))

    def gradient(
        self, recorded: RecordedPrompts, gates: Gates, loss: Loss
    ) -> tuple[float, Float[Tensor, " node"]]:
        """As `GatedForward.gradient`."""
        of = _hash("gradient", loss, fingerprint(recorded.pairs), _of_tensor(gates.flat()))
        found = self.journal.kept(
            Gradient,
            of,
            lambda: Gradient(*super(KeptForward, self).gradient(recorded, gates, loss)),
        )
        return found.loss, found.values.to(gates.flat().device)

    def evaluate(
        self,
        recorded: RecordedPrompts,
        each: Sequence[Gates],
        *,
        seed: int = 0,
        progress: Callable[[int], object] = lambda runs: None,
    ) -> list[NodesEvaluation]:
        """As `GatedForward.evaluate`."""
        gates = [_of_tensor(some.flat()) for some in each]
        of = _hash("evaluate", str(seed), fingerprint(recorded.pairs), *gates)
        ran: list[NodesEvaluation] = []

        def compute() -> Evaluated:
            how: dict[str, Any] = {"seed": seed, "progress": progress}
            ran.extend(super(KeptForward, self).evaluate(recorded, each, **how))
            return Evaluated(tuple(ran))

        kept = self.journal.kept(Evaluated, of, compute)
        if not ran:
            progress(len(recorded) * len(each))
        return ran or list(kept.answers)


@checked
def kept_forward(
    forward: GatedForward, folder: str | Path, prompts: PromptBatch | PairBatch, *told: object
) -> KeptForward:
    """The same model with gates, whose every run is kept in a folder; all processes see the same.

    Args:
        forward: the model; its weights, the ablation and how it is run count.
        folder: where runs are kept.
        prompts: the prompts of the search.
        told: what else the search depends on; things whose text says all of them.

    Raises:
        InputError: if the folder can't be written to, or has steps of another search.
    """
    clean = prompts.clean if isinstance(prompts, PairBatch) else prompts
    texts = [fingerprint(prompts), repr(clean.role_names), repr(told), str(n_ranks())]
    texts.append("none" if clean.roles is None else _of_tensor(clean.roles))
    texts += [forward.engine, str(forward.batch_size), forward.metric.name]
    texts += [f"{name} {_of_tensor(held)}" for name, held in forward.model.named_parameters()]
    for name, held in vars(forward.ablation).items():
        texts.append(f"{name} {_of_tensor(held) if isinstance(held, Tensor) else held}")
    made: list[Journal] = []

    def make() -> Result:
        made.append(Journal.open(folder, texts))
        return _Known(len(made[0].known))

    known = from_first(make)
    assert isinstance(known, _Known)
    if made:
        return KeptForward.keeping(forward, made[0])
    journal = Journal(Path(folder), _hash(*texts))
    journal.known = [journal.path(i) for i in range(known.n_steps)]
    return KeptForward.keeping(forward, journal)


@dataclass(frozen=True)
class _Known(Result):
    n_steps: int


def _of_tensor(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content.update(flat.view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _hash(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]
