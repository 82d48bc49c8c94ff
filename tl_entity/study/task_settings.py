"""The settings of a study of any task, and what they ask for. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_entity._typing import checked
from tl_entity.errors import InputError, did_you_mean
from tl_entity.models.registry import public_name
from tl_entity.studies.design import Recipe, StudyDesign, StudyTask, check_experiments
from tl_entity.studies.entity_tracking import NAME, box_task, paper_recipe, paper_study
from tl_entity.studies.marked_file import marked_file, read_recipe, read_rows, recipe_of
from tl_entity.studies.shipped import SHIPPED, shipped_task
from tl_entity.study.settings import Settings, resolve_sizes

PAPER = "paper"
"""The name of the paper's recipe, for the task of boxes."""

TASKS = (NAME, *SHIPPED)
"""Tasks that have a name."""


@dataclass(frozen=True)
class TaskSettings(Settings):
    """The settings of a study of any task; those of `Settings` and what the task is.

    Attributes:
        task: a task that ships (boxes, indirect_objects, agreement, years, capitals, addition), or
            a file of marked texts, one JSON object a line with clean, corrupt and answer.
        recipe: how circuits are found: a JSON file of stages, or paper for the four of the paper,
            which boxes have; None for no circuits.
        knowing: names of the file's marks that depend on what is asked.
        joined: the file's answers follow without a space.
    """

    task: str = NAME
    recipe: str | None = None
    knowing: tuple[str, ...] = ()
    joined: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        is_file = self.task not in TASKS
        if not is_file and (self.knowing or self.joined):
            raise InputError(
                f"Marks that know the answer, and how it follows, are said of a file of marked "
                f"texts; the task {self.task} knows its own."
            )
        if self.recipe == PAPER and self.task != NAME:
            raise InputError(f"The paper's recipe is for the task {NAME}, not {self.task}.")
        has = {"recipe": self.recipe is not None, "information": self.task == NAME}
        check_experiments(self.only or (), self.task, **has)
        if self.sizes is not None and self.recipe != PAPER:
            raise InputError("Sizes go with the paper's recipe; a recipe's file has its own.")
        if self.ceiling and is_file:
            raise InputError(
                "A circuit can't be found again from a file's texts: there are no other texts."
            )

    def check_files(self) -> None:
        """Make sure that the files of task and recipe are there and hold what they should.

        Raises:
            InputError: if one does not, or there is no such task.
        """
        if self.task not in TASKS:
            _check_task_file(self.task)
        if self.recipe is not None and self.recipe != PAPER:
            read_recipe(self.recipe)

    def public(self) -> dict[str, Any]:
        """The settings as others may read them."""
        given = super().public()
        for name in ("task", "recipe"):
            if given[name] not in (None, PAPER, *TASKS):
                given[name] = public_name(given[name])
        return given


@checked
def design_of(settings: Settings, n_heads: int) -> StudyDesign:
    """What settings ask of models of so many heads: the paper's study, or that of a task.

    Raises:
        InputError: if sizes don't fit, or an experiment is asked for that the task does not allow.
    """
    if not isinstance(settings, TaskSettings):
        return paper_study(settings.boxes, *resolve_sizes(settings, n_heads), settings.only)
    settings.check_files()
    recipe = _recipe(settings, n_heads)
    return StudyDesign(_task(settings), recipe, settings.only, from_python=False)


def _task(settings: TaskSettings) -> StudyTask:
    if settings.task == NAME:
        return box_task(settings.boxes)
    if settings.task in SHIPPED:
        return shipped_task(settings.task)
    return marked_file(
        settings.task, knowing=settings.knowing, space=not settings.joined, seed=settings.seed
    )


def _recipe(settings: TaskSettings, n_heads: int) -> Recipe | None:
    if settings.recipe is None:
        return None
    if settings.recipe == PAPER:
        return paper_recipe(*resolve_sizes(settings, n_heads))
    return recipe_of(read_recipe(settings.recipe))


def _check_task_file(task: str) -> None:
    if not Path(task).exists():
        meant = did_you_mean(task, TASKS)
        raise InputError(
            f"There is no task {task!r:.200}, and no file of that name; tasks that ship are "
            f"{', '.join(TASKS)}{meant}"
        )
    read_rows(task)
