"""Prompts and pairs of the tasks that ship, for any tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from random import Random
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch, PromptBatch
from tl_entity.tasks.marked import one_token_words
from tl_entity.tasks.own import marked_pairs
from tl_entity.tasks.shipped import addition, agreement, capitals, indirect_objects, years
from tl_entity.tasks.shipped.task import Task, Words

TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {
        module.TASK.name: module.TASK
        for module in (indirect_objects, agreement, years, capitals, addition)
    }
)
"""The tasks that ship, by name."""

LEFT_OUT_SHOWN = 20
"""Words that messages name, at most."""


@dataclass(frozen=True)
class TaskWords:
    """Which of a task's words a tokenizer writes as one token, in all their forms.

    Attributes:
        used: those words, by list.
        left_out: the others.
    """

    used: Words
    left_out: Words

    def __str__(self) -> str:
        return "; ".join(
            f"{name}: {len(self.used[name])} of {len(self.used[name]) + len(left)} words used"
            + (f", not {_shown(left)}" if left else "")
            for name, left in self.left_out.items()
        )


@checked
def task_words(name: str, tokenizer: PreTrainedTokenizerBase) -> TaskWords:
    """The words of a task that can be used with a tokenizer, and those that are left out.

    Raises:
        InputError: if no task has the name.
    """
    used: dict[str, list[tuple[str, ...]]] = {}
    left_out: dict[str, list[tuple[str, ...]]] = {}
    for of_list, words in task_named(name).words.items():
        forms = [form for word in words for form in word]
        known = set(one_token_words(tokenizer, forms))
        used[of_list] = [word for word in words if known.issuperset(word)]
        left_out[of_list] = [word for word in words if not known.issuperset(word)]
    return TaskWords(used, left_out)


@checked
def task_pairs(name: str, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> PairBatch:
    """Clean and corrupt prompts of a task that ships, with answers and foils.

    The same seed draws the same pairs, so long as the tokenizer has the same words as one token.

    Args:
        name: which of `TASKS`.
        tokenizer: the model's.
        n: how many pairs.
        seed: of the draws.

    Raises:
        InputError: if no task has the name, no pair is asked for, too few of the task's words are
            one token, or the tokenizer writes numbers in a way that the task can't ask for.
    """
    task = task_named(name)
    if n < 1:
        raise InputError(f"{n} pairs of the task {name!r}: ask for at least one.")
    words = task_words(name, tokenizer)
    for of_list, needed in task.needs.items():
        if len(words.used[of_list]) < needed:
            raise InputError(
                f"The task {name!r} needs {needed} words of the list {of_list!r}, and this "
                f"tokenizer writes {len(words.used[of_list])} of them as one token; not "
                f"{_shown(words.left_out[of_list])}."
            )
    draw = task.drawer(tokenizer, words.used)
    random = Random(f"{name} {seed}")
    texts = [draw(random) for _ in range(n)]
    return marked_pairs(
        tokenizer,
        [pair.clean for pair in texts],
        [pair.corrupt for pair in texts],
        answers=[pair.answer for pair in texts],
        foils=[pair.foil for pair in texts],
        knowing=task.knowing,
        space=task.space,
    )


@checked
def task_prompts(
    name: str, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0
) -> PromptBatch:
    """Prompts of a task that ships: the clean ones of `task_pairs`.

    Args:
        name: which of `TASKS`.
        tokenizer: the model's.
        n: how many prompts.
        seed: of the draws.

    Raises:
        InputError: as `task_pairs`.
    """
    return task_pairs(name, tokenizer, n, seed).clean


@checked
def task_named(name: str) -> Task:
    """The task that ships under a name.

    Raises:
        InputError: if there is none.
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"No task is called {name!r}: they are {', '.join(TASKS)}{meant}")
    return TASKS[name]


def _shown(words: Sequence[tuple[str, ...]]) -> str:
    more = f" and {len(words) - LEFT_OUT_SHOWN} more" if len(words) > LEFT_OUT_SHOWN else ""
    return ", ".join("/".join(word) for word in words[:LEFT_OUT_SHOWN]) + more
