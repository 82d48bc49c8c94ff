"""Lists of edits, and the one kind of them that is computed in a way of its own."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tl_entity._model import Model
from tl_entity.exact.ablation import AblatedRun
from tl_entity.heads import Circuit, HeadsAt, heads_by_position
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.run import HookFunction
from tl_entity.tasks.batches import PromptBatch

Edits = Sequence[tuple[str, HookFunction]]
"""Hooks of one run: full hook point names and edits made there."""


@dataclass(frozen=True)
class KeptHeads:
    """Circuits by themselves: every head is ablated at every token but a circuit's own, F(C).

    The run with every head ablated is the same for all circuits, so the exact engine makes it once;
    each circuit then costs its own named positions only.

    Attributes:
        ablation: what ablated heads put out.
        circuits: heads kept, by named position or role.
        removed: for each circuit heads that are ablated all the same.
    """

    ablation: Ablation
    circuits: Sequence[Circuit | HeadsAt]
    removed: Sequence[Circuit | HeadsAt | None]

    def edits(self, prompts: PromptBatch) -> Iterator[Edits]:
        """The same as hooks, a circuit at a time."""
        for circuit, heads in zip(self.circuits, self.removed, strict=True):
            yield ablate_heads(self.ablation, prompts, keep=circuit, remove=heads)

    def by_position(self, prompts: PromptBatch) -> bool:
        """Whether all heads are at named positions. Roles are at too many tokens for a
        recomputation to save anything."""
        edited = [*self.circuits, *(heads for heads in self.removed if heads is not None)]
        return all(
            name in prompts.positions or not heads
            for some in edited
            for name, heads in heads_by_position(some).items()
        )

    def resid_each(self, model: Model, prompts: PromptBatch, memory: int) -> Iterable[Tensor]:
        """The final residual stream at `"last"` with each circuit by itself."""
        run = AblatedRun.record(model, prompts, self.ablation)
        return run.answer_resid_each(self.circuits, removed=self.removed, memory=memory)
