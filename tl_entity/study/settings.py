"""What the main job is asked to do, and what it takes where nothing is said. Needs no torch."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tl_entity._typing import checked
from tl_entity.choices import GIB, AblationKind, Dtype, Engine, MatmulPrecision
from tl_entity.errors import InputError, did_you_mean
from tl_entity.heads import Circuit
from tl_entity.models.registry import planted_circuit, public_name
from tl_entity.studies.entity_tracking import GROUPS as GROUPS
from tl_entity.studies.entity_tracking import default_receivers, default_sizes

EXPERIMENTS: tuple[str, ...] = (
    "mechanism",
    "faithfulness",
    "completeness",
    "minimality",
    "attention",
    "dcm",
    "information",
    "knockout",
    "cmap",
    "comparison",
    "gain",
)
"""What can be asked for by itself."""

SHOWN_BY: Mapping[str, str | None] = {
    "accuracy": None,
    "heatmaps": None,
    "circuit": None,
    "circuits": None,
    "mechanism_map": "mechanism",
    "mechanism_nodes": "mechanism",
    "mechanism_edges": "mechanism",
    "mechanisms": "mechanism",
    "gain_kinds": "gain",
    "gain_shares": "gain",
    "gain_grafts": "gain",
    "gain_corners": "gain",
    "gain_units": "gain",
    "gain_inside": "gain",
    "masks": "dcm",
    "carries": "information",
    "carries_own_heads": "information",
    "carries_base_heads": "information",
    "cmap_tuned_into_base": "cmap",
    "cmap_base_into_tuned": "cmap",
    "cmap_control_into_base": "cmap",
    "cmap_tuned_into_base_as_published": "cmap",
    "verdict": "comparison",
}
"""The experiment behind a figure or table of another name; None for what is always done. Names of
figures may have the model's role in front."""

OF_TWO_MODELS = frozenset({"cmap", "comparison", "gain"})
"""Experiments that need a second model, of the same architecture."""

FEWEST_PAIRS = 8
"""With fewer prompts answered right, there is no score worth the name."""

LEAST: Mapping[str, int] = {
    "prompts": 2,
    "mechanism_prompts": 6,
    "gain_prompts": 2,
    "pairs": 2,
    "boxes": 2,
    "random_circuits": 0,
    "mask_pairs": 4,
    "draws": 1,
    "mask_seeds": 1,
    "seed": 0,
    "batch_size": 1,
}
MOST: Mapping[str, int] = {
    "prompts": 100_000,
    "mechanism_prompts": 100_000,
    "gain_prompts": 100_000,
    "pairs": 100_000,
    "random_circuits": 10_000,
    "mask_pairs": 100_000,
    "draws": 1_000,
    "mask_seeds": 1_000,
}
"""Smallest and largest values of settings that are counts. Beyond these, making the prompts alone
takes longer than anybody waits, and an interval gets no narrower that a figure could show."""

LEAST_MEMORY = 1e-6
"""GiB for intermediate results; a kilobyte."""


@dataclass(frozen=True)
class Settings:
    """The main job's settings.

    The command line makes its options, and explains them, from what stands here.

    Attributes:
        base: base model: a name, a folder, a GGUF file or a hub id.
        tuned: its fine-tune, given likewise; None to study one model alone.
        base_adapter: folder or hub id of a LoRA adapter to merge into the base model.
        tuned_adapter: the same for the fine-tune, which may be the base itself.
        control: a third model whose heads the base gets as well, as a control for the fine-tune's.
        control_adapter: the same for the control.
        prompts: prompts an accuracy.
        pairs: pairs of prompts that each circuit is found from; None for as many as `prompts`.
        boxes: boxes in a prompt; accuracy is measured for 2 up to so many.
        sizes: heads kept in each of the four groups; None for as many as were planted, or else the
            share that they have in the paper.
        receiver_sizes: how many heads of each of the first three groups the next stage patches
            into; None for all that were planted, or else the paper's share of the group.
        random_circuits: how many random circuits to compare with.
        ablation: what ablated heads put out: the mean over all tokens of the same role (pooled),
            another prompt's output at such a token (resample), the mean at the token's index
            (index, the paper's, which is always shown beside), or nothing (zero).
        mask_pairs: pairs of prompts that DCM learns a mask from, half of them to train, the others
            to choose and to test.
        sparsities: prices of a head that DCM tries, each by itself; the best mask on validation
            pairs is used.
        mask_seeds: draws of pairs that DCM learns a mask from, each by itself.
        draws: draws of the prompts that heads are patched on.
        all_pairs: also find circuits from prompts that the model answers wrong.
        seed: all random choices follow from it.
        engine: how paths are patched: computing only what can change (exact), or with a full run a
            head (hooks).
        batch_size: prompts run together; None for what memory allows.
        memory: GiB that intermediate results may take; None for a quarter of the device's memory,
            on a CPU at most 2.
        dtype: of weights and activations.
        device: such as cpu or cuda; None for the best there is.
        matmul_precision: of float32 matrix products, where the hardware has faster ones: high is
            TF32, medium bfloat16.
        mechanism_prompts: prompts that the mechanism is found on (half of them) and tested on; None
            for three times `prompts`.
        target: the share of the accuracy that a mechanism must keep, with the lower end of its
            interval.
        agreement: the share of prompts that a mechanism must answer as the whole model does, with
            the lower end of its interval.
        gate_training: how the mechanism's gates are trained, where not as usual: fields of
            GateTraining.
        edges: also score the edges between the nodes of each mechanism.
        gain_prompts: prompts that the shares of the gain are from.
        ceiling: find the base's circuit and mechanism once more from other prompts, to set what two
            share beside what one shares with itself. It takes as long as the first time.
        only: the experiments wanted, of `EXPERIMENTS`; None for all. Accuracy is always measured,
            and circuits are found unless nothing wanted needs one.
        png: also draw every figure as PNG, which takes a second or two each.
    """

    base: str = "default-base"
    tuned: str | None = "default-tuned"
    base_adapter: str | None = None
    tuned_adapter: str | None = None
    control: str | None = None
    control_adapter: str | None = None
    prompts: int = 200
    pairs: int | None = None
    boxes: int = 7
    sizes: Mapping[str, int] | None = None
    receiver_sizes: Mapping[str, int] | None = None
    random_circuits: int = 10
    ablation: AblationKind = "pooled"
    mask_pairs: int = 400
    sparsities: tuple[float, ...] = (0.01,)
    mask_seeds: int = 1
    draws: int = 5
    all_pairs: bool = False
    seed: int = 0
    engine: Engine = "exact"
    batch_size: int | None = None
    memory: float | None = None
    dtype: Dtype = "float32"
    device: str | None = None
    matmul_precision: MatmulPrecision = "highest"
    mechanism_prompts: int | None = None
    target: float = 0.9
    agreement: float = 0.85
    gate_training: Mapping[str, int | float | str] | None = None
    edges: bool = False
    gain_prompts: int = 40
    ceiling: bool = False
    only: tuple[str, ...] | None = None
    png: bool = True

    def __post_init__(self) -> None:
        for name in {**LEAST, **MOST}:
            _check_count(name, getattr(self, name))
        for name, share in (("target", self.target), ("agreement", self.agreement)):
            if not 0 < share <= 1:
                raise InputError(f"The {name} is a share above 0 and up to 1, not {share:g}.")
        if not self.sparsities or not all(0 <= price < math.inf for price in self.sparsities):
            raise InputError(
                f"Sparsities are prices of 0 or more, not {', '.join(map(str, self.sparsities))}."
            )
        if len(set(self.sparsities)) < len(self.sparsities):
            raise InputError("Every sparsity can be there once.")
        if self.tuned_adapter is not None and self.tuned is None:
            raise InputError("There is an adapter for a fine-tuned model, and no such model.")
        if self.control_adapter is not None and self.control is None:
            raise InputError("There is an adapter for a control model, and no such model.")
        if self.control is not None and self.tuned is None:
            raise InputError("A control stands beside a fine-tuned model, and there is none.")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise InputError(f"Memory must be above 0 GiB, not {self.memory:g}.")
        if self.memory is not None and self.memory < LEAST_MEMORY:
            raise InputError(
                f"Memory must be at least {LEAST_MEMORY:g} GiB, not {self.memory:g}: in less, not "
                "one prompt's numbers have room."
            )
        unknown = set(self.only or ()) - set(EXPERIMENTS)
        if unknown:
            raise InputError(
                f"There is no experiment {', '.join(sorted(unknown))}; there are "
                f"{', '.join(EXPERIMENTS)}{did_you_mean(min(unknown), EXPERIMENTS)}"
            )

    @property
    def discovery_pairs(self) -> int:
        """Pairs that each circuit is found from."""
        return self.prompts if self.pairs is None else self.pairs

    @property
    def prompts_of_mechanism(self) -> int:
        """Prompts that a mechanism is found and tested on."""
        return 3 * self.prompts if self.mechanism_prompts is None else self.mechanism_prompts

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as the methods take it."""
        return None if self.memory is None else round(self.memory * GIB)

    @property
    def models(self) -> dict[str, str]:
        """Name or folder of each model that is studied, by its role."""
        return {"base": self.base} | ({} if self.tuned is None else {"tuned": self.tuned})

    @property
    def sources(self) -> dict[str, str]:
        """The same with the control, of which nothing but its heads is used."""
        return self.models | ({} if self.control is None else {"control": self.control})

    @property
    def adapters(self) -> dict[str, str | None]:
        """The adapter of each model by its role; None where it has none."""
        return {
            "base": self.base_adapter,
            "tuned": self.tuned_adapter,
            "control": self.control_adapter,
        }

    def public(self) -> dict[str, Any]:
        """The settings as others may read them, who know nothing of places on this machine."""
        given = dataclasses.asdict(self)
        for role in ("base", "tuned", "control"):
            for name in (role, f"{role}_adapter"):
                if given[name] is not None:
                    given[name] = public_name(given[name])
        return given

    def planted(self, role: str) -> Circuit | None:
        """The circuit planted in a model, if one was and no adapter has changed it since."""
        return planted(self.models[role]) if self.adapters[role] is None else None


def _check_count(name: str, count: int | None) -> None:
    words = f"The {name.replace('_', ' ')}" if name == "batch_size" else name.replace("_", " ")
    if count is None:
        return
    if count < LEAST.get(name, count):
        raise InputError(f"{words} must be at least {LEAST[name]}, not {count}.")
    if count > MOST.get(name, count):
        raise InputError(f"{words} must be at most {MOST[name]}, not {count}.")


@checked
def experiments_for(names: Iterable[str]) -> tuple[str, ...]:
    """The experiments behind names of experiments, figures and tables, such as `base_knockout`.

    Raises:
        InputError: if there is no name, or one is none of these.
    """
    found: dict[str, None] = {}
    names = tuple(names)
    for name in names:
        bare = name.removeprefix("base_").removeprefix("tuned_")
        shown = next((known for known in (name, bare) if known in (*EXPERIMENTS, *SHOWN_BY)), None)
        if shown is None:
            others = ", ".join(SHOWN_BY)
            meant = did_you_mean(name, (*EXPERIMENTS, *SHOWN_BY))
            raise InputError(
                f"There is no experiment, figure or table {name}; there are "
                f"{', '.join(EXPERIMENTS)}, and the figures and tables {others}{meant}"
            )
        experiment = SHOWN_BY.get(shown, shown)
        if experiment is not None:
            found[experiment] = None
    if not names:
        raise InputError("Say which experiments, figures or tables are wanted.")
    return tuple(found)


@checked
def stream_seed(seed: int, *names: str | int) -> int:
    """A seed of its own for each purpose, so that no two draw the same prompts."""
    text = " ".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@checked
def planted(name_or_path: str) -> Circuit | None:
    """The circuit planted in a model, if one was."""
    path = planted_circuit(name_or_path)
    return None if path is None else Circuit.load(path)


@checked
def resolve_sizes(settings: Settings, n_heads: int) -> tuple[dict[str, int], dict[str, int]]:
    """Group sizes and receiver sizes for models of so many heads in all.

    Raises:
        InputError: if a size is below one or above the number of heads, or a stage would patch into
            more heads than the model has.
    """
    known = settings.planted("base")
    sizes = default_sizes(known, n_heads) if settings.sizes is None else dict(settings.sizes)
    if settings.receiver_sizes is not None:
        receivers = dict(settings.receiver_sizes)
    elif known is not None and settings.sizes is None:
        receivers = {group: sizes[group] for group in GROUPS[:-1]}
    else:
        receivers = default_receivers(sizes)
    for what, counts in (("The group", sizes), ("The receivers of the group", receivers)):
        for group, count in counts.items():
            if not 1 <= count <= n_heads:
                raise InputError(
                    f"{what} {group} can't be {count} heads: the model has {n_heads}, "
                    "and at least one is needed."
                )
    return sizes, receivers
