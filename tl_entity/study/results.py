"""What a study finds, as one result: by model and experiment what the methods return."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tl_entity.heads import Circuit
from tl_entity.methods.circuits import recall_by_group
from tl_entity.methods.compare import Comparison
from tl_entity.methods.completeness import Completeness
from tl_entity.methods.discovery import Discovery
from tl_entity.methods.knockout import KnockoutCurves
from tl_entity.metrics import RELATIVE_PROBABILITY
from tl_entity.results import Result, plain
from tl_entity.studies.design import Words
from tl_entity.studies.entity_tracking import GROUPS, NAME, SAYS, WORDS
from tl_entity.study.experiment_results import (
    AccuracyByBoxes,
    AccuracyOnTask,
    CarriedByCircuit,
    CircuitAttention,
    CircuitsAlone,
    GroupMasks,
    KeptPairs,
    MinimalityByAblation,
    Transfer,
)
from tl_entity.study.gain_results import Gain
from tl_entity.study.mechanism_results import MechanismOfModel, SameMechanism
from tl_entity.study.settings import Settings
from tl_entity.study.task_settings import TaskSettings

if TYPE_CHECKING:
    import pandas as pd

Answer = Literal["yes", "partly", "no", "can't tell"]


@dataclass(frozen=True)
class Finding:
    """One question and what the numbers say.

    Attributes:
        question: what was asked.
        answer: in a word.
        text: in a sentence or two, with numbers and intervals.
        figure: name of the figure that shows it.
        brief: what the headline has to say of it; empty if nothing.
    """

    question: str
    answer: Answer
    text: str
    figure: str
    brief: str = ""


@dataclass(frozen=True)
class About:
    """What a model is.

    Attributes:
        name: its name, folder or hub id.
        label: what it is called where it is shown.
        adapter: of a LoRA adapter merged into it.
        note: what the registry says of it.
        n_layers: its layers.
        n_heads: its heads a layer.
        fingerprint: hash of its weights, sizes and vocabulary.
    """

    name: str
    label: str
    adapter: str | None
    note: str | None
    n_layers: int
    n_heads: int
    fingerprint: str


@dataclass(frozen=True)
class StudiedTask:
    """What a study was of.

    Attributes:
        name: of the task.
        says: what is asked.
        groups: the groups looked for, in their order.
        metric: what they were looked for by.
        example: a prompt, token by token.
        positions: where the named positions are in it.
        answer: what should follow it.
        from_python: whether the task was given from Python, so that no command stands for it.
    """

    name: str = NAME
    says: str = SAYS
    groups: tuple[str, ...] = GROUPS
    metric: str = RELATIVE_PROBABILITY.name
    example: tuple[str, ...] = ()
    positions: Mapping[str, int] = field(default_factory=dict[str, int])
    answer: str = ""
    from_python: bool = False

    @property
    def words(self) -> Words:
        """What names are called; the paper's has words of its own."""
        return WORDS if self.name == NAME else Words()


@dataclass(frozen=True)
class ModelFindings(Result):
    """What was found of one model. What was not asked for is None.

    Attributes:
        about: the model.
        accuracy: its accuracy.
        no_circuit: why no circuit was looked for in it; None if one was.
        mechanism: the fewest nodes that alone answer as it does.
        pairs: those the circuit was found from.
        discovery: the circuit.
        faithfulness: what the circuit does alone.
        completeness: what circuit and model lose by the same heads.
        minimality: which of its heads are needed.
        attention: what they attend to.
        dcm: which of them carry what information, by masks.
        information: what patching those brings.
        knockout: where information passes from token to token.
        planted: the circuit that was planted in the model.
    """

    about: About
    accuracy: AccuracyByBoxes | AccuracyOnTask
    no_circuit: str | None
    mechanism: MechanismOfModel | None = None
    pairs: KeptPairs | None = None
    discovery: Discovery | None = None
    faithfulness: CircuitsAlone | None = None
    completeness: Completeness | None = None
    minimality: MinimalityByAblation | None = None
    attention: CircuitAttention | None = None
    dcm: GroupMasks | None = None
    information: CarriedByCircuit | None = None
    knockout: KnockoutCurves | None = None
    planted: Circuit | None = None

    def __str__(self) -> str:
        return f"{self.about.label}: {self.accuracy}"

    @property
    def label(self) -> str:
        """What the model is called."""
        return self.about.label

    @property
    def circuit(self) -> Circuit:
        """Its circuit; one without groups if none was looked for."""
        return Circuit(()) if self.discovery is None else self.discovery.circuit

    def to_dataframe(self) -> "pd.DataFrame":
        """Its accuracies."""
        return self.accuracy.to_dataframe()

    def to_json(self) -> dict[str, Any]:
        """What the model is, and each experiment that was done."""
        done = {
            name: plain(found)
            for name in (
                "mechanism",
                "pairs",
                "discovery",
                "faithfulness",
                "completeness",
                "minimality",
                "attention",
                "dcm",
                "information",
                "knockout",
            )
            if (found := getattr(self, name)) is not None
        }
        if self.discovery is not None:
            done["circuit"] = plain(self.circuit)
        return {
            **asdict(self.about),
            "accuracy": self.accuracy.to_json(),
            "no_circuit": self.no_circuit,
            "planted": None if self.planted is None else _planted(self.circuit, self.planted),
            **done,
        }


@dataclass(frozen=True)
class Study(Result):
    """All that a study found: what results.json, the tables, the figures and the verdict are made
    of.

    Attributes:
        settings: what was asked for.
        sizes: heads kept, by group.
        receiver_sizes: heads patched into, by group.
        seeds: every seed that was drawn from the one given, by purpose.
        versions: of the software.
        models: by role.
        not_compared: why the models were not compared; None if they could be.
        same_mechanism: which nodes both mechanisms have.
        same_circuit: which heads both circuits have.
        control: the model whose heads stand beside the fine-tune's.
        cmap: heads of one model patched into another, by name.
        gain: where the fine-tune's gain lies.
        verdict: the answers.
        task: what it is of.
    """

    settings: Settings | TaskSettings
    sizes: Mapping[str, int]
    receiver_sizes: Mapping[str, int]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    models: Mapping[str, ModelFindings]
    not_compared: str | None
    same_circuit: Comparison | None = None
    control: About | None = None
    cmap: Mapping[str, Transfer] = field(default_factory=dict[str, Transfer])
    verdict: tuple[Finding, ...] = ()
    task: StudiedTask = field(default_factory=StudiedTask)
    same_mechanism: SameMechanism | None = None
    gain: Gain | None = None

    def __str__(self) -> str:
        return "; ".join(map(str, self.models.values()))

    @property
    def with_circuit(self) -> dict[str, ModelFindings]:
        """The models that a circuit was looked for in, by role."""
        return {role: model for role, model in self.models.items() if model.no_circuit is None}

    @property
    def labels(self) -> dict[str, str]:
        """What each model is called, by its role; the control, too, if there is one."""
        labels = {role: model.label for role, model in self.models.items()}
        return labels if self.control is None else labels | {"control": self.control.label}

    def to_dataframe(self) -> "pd.DataFrame":
        """The accuracies of every model."""
        import pandas as pd

        frames = [model.to_dataframe().assign(model=model.label) for model in self.models.values()]
        return pd.concat(frames, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        control = self.control
        return {
            "settings": {
                **plain(self.settings.public()),
                "sizes": dict(self.sizes),
                "receiver_sizes": dict(self.receiver_sizes),
            },
            "seeds": dict(self.seeds),
            "versions": dict(self.versions),
            "task": plain(self.task),
            "models": plain(self.models),
            "not_compared": self.not_compared,
            "same_mechanism": plain(self.same_mechanism),
            "same_circuit": plain(self.same_circuit),
            "control": None
            if control is None
            else {
                key: getattr(control, key) for key in ("name", "label", "adapter", "fingerprint")
            },
            "cmap": plain(self.cmap),
            "gain": plain(self.gain),
            "verdict": plain(self.verdict),
        }


def _planted(circuit: Circuit, known: Circuit) -> dict[str, Any]:
    """Planted heads found and missed, by group."""
    recall = recall_by_group(circuit, known)
    groups = {
        group.name: {
            "planted": plain(group.heads),
            "found": plain(recall[group.name][0]),
            "missed": plain(recall[group.name][1]),
            "not_planted": plain([h for h in circuit[group.name] if h not in group.heads]),
        }
        for group in known
    }
    found = sum(len(group["found"]) for group in groups.values())
    return {
        "groups": groups,
        "found": found,
        "planted": len(known),
        "chosen": len(circuit),
        "recall": found / len(known) if len(known) else None,
        "precision": found / len(circuit) if len(circuit) else None,
    }
