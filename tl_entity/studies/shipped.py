"""The tasks that ship, as tasks of a study. Needs no torch before prompts are drawn."""

from typing import TYPE_CHECKING

from tl_entity.studies.design import Part, StudyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tl_entity.tasks.batches import PairBatch

SHIPPED = ("indirect_objects", "agreement", "years", "capitals", "addition")
"""Names of the tasks that ship, as `tl_entity.tasks.shipped` has them."""


def shipped_task(name: str) -> StudyTask:
    """One of the tasks that ship.

    Raises:
        InputError: if none has the name.
    """
    from tl_entity.tasks.shipped.draw import task_named, task_pairs

    def pairs(tokenizer: "PreTrainedTokenizerBase", n: int, seed: int, part: Part) -> "PairBatch":
        return task_pairs(name, tokenizer, n, seed)

    return StudyTask(
        name=name, says=task_named(name).says, pairs=pairs, inputs={"task": name}, has_foils=True
    )
