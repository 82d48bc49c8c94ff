"""What a study is of: a task, the recipe by which its circuit is found, and the experiments.

Needs no torch before prompts are drawn.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from tl_entity.choices import AblationKind
from tl_entity.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tl_entity.methods.discovery import Overlaps, Stage
    from tl_entity.tasks.batches import PairBatch, PromptBatch

Part = Literal["finding", "testing", "ablation"]
"""What prompts are for: to find circuits and mechanisms, to test them, to make ablations of. A task
of a fixed number of prompts gives different ones for each."""

DrawPairs = Callable[["PreTrainedTokenizerBase", int, int, Part], "PairBatch"]
"""From a tokenizer, how many, a seed and what they are for to pairs."""

DrawPrompts = Callable[["PreTrainedTokenizerBase", int, int, Part], "PromptBatch"]
"""The same for prompts."""

Draws = Mapping[str, Callable[[int], "PairBatch"]]
"""For each kind of information a function from a seed to pairs that differ in it."""

WITHOUT_CIRCUIT = ("mechanism", "knockout", "gain")
"""Experiments that need no circuit."""

ON_CIRCUITS = (
    "faithfulness",
    "completeness",
    "minimality",
    "attention",
    "cmap",
    "comparison",
)
"""Experiments on a circuit's groups."""

ON_INFORMATION = ("dcm", "information")
"""Experiments on what a circuit's groups carry."""

_INPUT_WORDS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Words:
    """What the names in a study are called where people read them; others stand as they are.

    Attributes:
        letters: a letter for each group.
        positions: named positions in words.
        information: kinds of information in words.
    """

    letters: Mapping[str, str] = field(default_factory=dict[str, str])
    positions: Mapping[str, str] = field(default_factory=dict[str, str])
    information: Mapping[str, str] = field(default_factory=dict[str, str])

    def group(self, name: str) -> str:
        """A group with its letter, if it has one."""
        return f"{self.letters[name]} {name}" if name in self.letters else name

    def position(self, name: str) -> str:
        """A named position."""
        return self.positions.get(name, name.replace("_", " "))

    def kind(self, desideratum: str) -> str:
        """A kind of information."""
        return self.information.get(desideratum, desideratum.replace("_", " "))

    def stage(self, stage: Mapping[str, Any], group: str) -> str:
        """`B pos_transmitter: into the queries of A, last token`.

        Args:
            stage: of a discovery, as a mapping, or of results.json.
            group: the group found.
        """
        return f"{self.group(group)}: into {self.into(stage)}, {self.position(stage['position'])}"

    def into(self, stage: Mapping[str, Any]) -> str:
        """`the queries of A`, or of several groups; `the logits`."""
        first = [] if stage["into"] is None else [(stage["into"], stage["receiver_input"])]
        reached = [
            f"the {_INPUT_WORDS.get(given, 'inputs')} of {self.letters.get(name, name)}"
            for name, given in (*first, *stage.get("edges", ()))
        ]
        return " and ".join(reached) or "the logits"


@dataclass(frozen=True)
class StudyTask:
    """A task as a study needs it.

    Attributes:
        name: its name.
        says: what is asked, in a plain sentence.
        pairs: gives clean and corrupt prompts; or as many of them as there are.
        prompts: gives prompts; the clean ones of pairs if left out.
        inputs: what decides the prompts, besides their number and seed.
        by_size: for tasks that come in sizes, prompts of each; the last is the one studied.
        guessing: the share of prompts that guessing gets right.
        has_foils: whether pairs have a foil.
        information: gives, for so many pairs, draws of pairs that differ in one kind of
            information; None if the task has none.
        beside: an ablation that is shown beside the one asked for.
        hidden: pairs of named positions; attention from the first to the second is knocked out. If
            None, from `"last"` to every other position.
        words: what names are called.
        n_pairs: how many there are for each purpose, if they can't be drawn at will.
    """

    name: str
    says: str
    pairs: DrawPairs
    prompts: DrawPrompts | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    by_size: Mapping[int, DrawPrompts] = field(default_factory=dict[int, DrawPrompts])
    guessing: float = 0.0
    has_foils: bool = False
    information: "Callable[[PreTrainedTokenizerBase, int], Draws] | None" = None
    beside: AblationKind | None = None
    hidden: tuple[tuple[str, str], ...] | None = None
    words: Words = field(default_factory=Words)
    n_pairs: Mapping[Part, int] | None = None

    def draw(
        self, tokenizer: "PreTrainedTokenizerBase", n: int, *, seed: int, part: Part
    ) -> "PromptBatch":
        """Prompts for a purpose; as many as there are, of a task that has fewer."""
        if self.prompts is None:
            return self.pairs(tokenizer, n, seed, part).clean
        return self.prompts(tokenizer, n, seed, part)


@dataclass(frozen=True)
class Recipe:
    """How a circuit is found.

    Attributes:
        stages: one a group, in order.
        sizes: heads kept, by group.
        receiver_sizes: heads that later stages patch into, by group; for groups left out as many as
            are kept.
        metric: name of the metric that runs are scored by.
        overlaps: which group has a head that two at one position choose.
    """

    stages: "tuple[Stage, ...]"
    sizes: Mapping[str, int]
    receiver_sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    metric: str = "relative probability"
    overlaps: "Overlaps" = "stronger"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order in which they are found."""
        return tuple(stage.group for stage in self.stages)


def possible_experiments(*, recipe: bool, information: bool) -> tuple[str, ...]:
    """The experiments that there can be with a recipe and kinds of information, or without."""
    if not recipe:
        return WITHOUT_CIRCUIT
    return (*WITHOUT_CIRCUIT, *ON_CIRCUITS, *(ON_INFORMATION if information else ()))


def check_experiments(names: Iterable[str], task: str, *, recipe: bool, information: bool) -> None:
    """Make sure that experiments can be done.

    Raises:
        InputError: naming the first that can't, and what is lacking.
    """
    for name in names:
        if name in possible_experiments(recipe=recipe, information=information):
            continue
        if name in ON_INFORMATION and not information:
            lacks = "it has no kinds of information to tell apart"
        else:
            lacks = "it is done on a circuit, and there is no recipe to find one by"
        raise InputError(f"There can be no {name} of the task {task}: {lacks}.")


@dataclass(frozen=True)
class StudyDesign:
    """A study: what is asked of the models.

    Attributes:
        task: what they do.
        recipe: how their circuits are found; None to find no groups.
        experiments: what is done, besides accuracy; None for all that task and recipe allow.
        from_python: whether no settings stand for it.

    Raises:
        InputError: if an experiment needs a recipe, or kinds of information, that is not there.
    """

    task: StudyTask
    recipe: Recipe | None = None
    experiments: tuple[str, ...] | None = None
    from_python: bool = True

    def __post_init__(self) -> None:
        check_experiments(self.experiments or (), self.task.name, **self._has)

    @property
    def _has(self) -> dict[str, bool]:
        return {
            "recipe": self.recipe is not None,
            "information": self.task.information is not None,
        }

    @property
    def possible(self) -> tuple[str, ...]:
        """The experiments that task and recipe allow."""
        return possible_experiments(**self._has)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that are looked for."""
        return () if self.recipe is None else self.recipe.groups

    def wants(self, experiment: str) -> bool:
        """Whether an experiment is to be done."""
        return experiment in (self.possible if self.experiments is None else self.experiments)

    def needs_circuits(self) -> bool:
        """Whether anything that is to be done is done on circuits, or shown beside them as knockout
        is. If nothing is to be done but accuracy, circuits are what is asked for."""
        return not self.experiments or not set(self.experiments) <= {"mechanism", "gain"}

    def without_recipe(self) -> "StudyDesign":
        """The same without looking for circuits."""
        return replace(self, recipe=None)
