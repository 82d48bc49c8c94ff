"""Results with numbers of our choice, of which a verdict, figures and tables can be made."""

import math

import torch

from tl_entity.heads import Circuit, Group, Head
from tl_entity.methods.activation_patching import UNPATCHED, Carried, CarriedInformation
from tl_entity.methods.circuits import Evaluation, Faithfulness
from tl_entity.methods.cmap import OUTPUT, CrossModelPatching, Patched
from tl_entity.methods.compare import Comparison
from tl_entity.methods.completeness import Completeness, Removal
from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES, Discovery
from tl_entity.methods.overlap import Overlap
from tl_entity.methods.path_patching import HeadScores
from tl_entity.stats import NO_INTERVAL, Chance, Interval
from tl_entity.study.experiment_results import (
    AccuracyByBoxes,
    Alone,
    CarriedByCircuit,
    CircuitsAlone,
    Transfer,
)
from tl_entity.study.results import About, ModelFindings, Study
from tl_entity.study.settings import GROUPS, Settings

KINDS = ("object_value", "box_label_value", "position")
N = 100


def answered(first: int, after: int | None = None, n: int = N) -> Evaluation:
    """Right on the first so many prompts, or on those from `first` to `after`."""
    right = torch.zeros(n, dtype=torch.bool)
    right[slice(0, first) if after is None else slice(first, after)] = True
    return Evaluation(right.long(), right, torch.zeros(n))


def faithfulness(value: float, low: float, high: float) -> Faithfulness:
    return Faithfulness(answered(85), answered(90), value, Interval(low, high))


def alone(found: Faithfulness, *, random: tuple[int, ...] = (0, 8), **others) -> CircuitsAlone:
    """The circuit's faithfulness, and how many prompts of 100 random circuits answer right."""
    part = Alone(found, faithfulness(0.97, 0.93, 0.99), others, tuple(map(answered, random)))
    return CircuitsAlone({"pooled": part, "index": Alone(found, found, others, ())}, ())


def removal(name: str, difference: float, low: float, high: float) -> Removal:
    return Removal(
        name=name,
        heads={"last": (Head(0, 0), Head(0, 1))},
        of_circuit=answered(60),
        of_model=answered(80),
        circuit_loss=0.1 + difference,
        model_loss=0.1,
        circuit_loss_interval=Interval(difference, 0.2 + difference),
        model_loss_interval=Interval(0.0, 0.2),
        interval=Interval(low, high),
    )


def completeness(*removals: Removal) -> Completeness:
    return Completeness(
        whole=removal("", 0.0, -0.03, 0.03),
        groups=removals,
        random=(removal("random 0", 0.02, -0.05, 0.09),),
        seed=0,
        ablation="pooled",
    )


def carried(kind_of: dict[str, str], **entries: dict[str, int]) -> CarriedInformation:
    """What each group carries brings its target in 80 of 100 pairs, all else in 5.

    Args:
        kind_of: what each group carries.
        entries: of a group, how often other kinds bring theirs.
    """
    found = []
    for kind in KINDS:
        for group in (UNPATCHED, *GROUPS):
            right = entries.get(group, {}).get(kind, 80 if kind_of.get(group) == kind else 5)
            found.append(Carried(group, "last", (Head(0, 0),), kind, (0,), (right,), (N,)))
    return CarriedInformation(tuple(found))


CARRIED = {"value_fetcher": "object_value", **dict.fromkeys(GROUPS[1:], "position")}


def discovery() -> Discovery:
    """One head a group, by itself at its token."""
    heads = {group: Head(index, 0) for index, group in enumerate(GROUPS)}
    scores = {
        stage.group: HeadScores(
            per_example=torch.full((4, 1, 2), -0.5),
            clean_values=torch.zeros(2),
            position=stage.position,
            receivers=None if stage.into is None else (heads[stage.into],),
            receiver_input=stage.receiver_input,
            engine="exact",
        )
        for stage in ENTITY_TRACKING_STAGES
    }
    groups = tuple(Group(s.group, s.position, (heads[s.group],)) for s in ENTITY_TRACKING_STAGES)
    return Discovery(Circuit(groups), scores, {group: (head,) for group, head in heads.items()})


def model(label: str = "base", **found) -> ModelFindings:
    about = About(label, label, None, None, 4, 1, "print")
    found = {"discovery": discovery(), **found}
    return ModelFindings(about, AccuracyByBoxes({2: answered(60), 7: answered(50)}), None, **found)


def good_model(label: str = "base", **found) -> ModelFindings:
    """One whose circuit is its mechanism."""
    return model(
        label,
        **{
            "faithfulness": alone(
                faithfulness(0.95, 0.9, 0.98), base=faithfulness(0.93, 0.9, 0.97)
            ),
            "completeness": completeness(removal("value_fetcher", -0.05, -0.11, 0.01)),
            "information": CarriedByCircuit({"own": carried(CARRIED)}),
            **found,
        },
    )


def overlap(
    shared: int,
    lost: int = 0,
    new: int = 0,
    *,
    name: str = "whole circuit",
    p_value: float = 1e-6,
    expected: float = 2.0,
) -> Overlap:
    """So many heads in both circuits, only in the base's, only in the tuned model's."""
    places = [("last", Head(0, index)) for index in range(shared + lost + new)]
    # By chance none, or as many as there are.
    probabilities = (1 - p_value, *([0.0] * max(0, shared - 1)), p_value)
    chance = Chance(probabilities, expected, 0, 1)
    return Overlap(
        name,
        tuple(places[:shared]),
        tuple(places[shared + lost :]),
        tuple(places[shared : shared + lost]),
        population=99,
        chance=chance,
        chance_over_all_layers=chance,
        correlation=math.nan,
    )


def comparison(whole: Overlap, *groups: Overlap, ceiling: tuple[Overlap, ...] = ()) -> Comparison:
    return Comparison(groups, whole, (), {}, True, ceiling)


def patched(
    group: str,
    gain: float,
    low: float,
    high: float,
    share: tuple[float, float, float] | None = None,
) -> Patched:
    """A group's outputs patched into a base that answers 60 of 100 prompts right, of a gain of .3
    unless the share of it is given."""
    part, *ends = share or (gain / 0.3, low / 0.3, high / 0.3)
    return Patched(
        group,
        OUTPUT,
        {"last": (Head(0, 0),)},
        answered(round(100 * (0.6 + gain))),
        gain,
        Interval(low, high),
        part,
        Interval(*ends) if not math.isnan(part) else NO_INTERVAL,
    )


def into_base(*entries: Patched, tuned: Evaluation | None = None) -> CrossModelPatching:
    """Of a base that answers 60 of 100 prompts right, and a fine-tune that answers 90."""
    return CrossModelPatching(answered(60), tuned or answered(90), entries)


def into_tuned(*entries: Patched) -> CrossModelPatching:
    return CrossModelPatching(answered(90), answered(60), entries)


def study(
    *models: ModelFindings,
    same: Comparison | None = None,
    control: str | None = None,
    **cmap: CrossModelPatching | None,
) -> Study:
    roles = dict(zip(("base", "tuned"), models, strict=False))
    transfers = {
        name: Transfer(name.split("_into_")[1], name.split("_into_")[0], found)
        for name, found in cmap.items()
        if found is not None
    }
    return Study(
        settings=Settings(),
        sizes=dict.fromkeys(GROUPS, 1),
        receiver_sizes={},
        seeds={},
        versions={},
        models=roles,
        not_compared=None,
        same_circuit=same,
        control=None if control is None else About(control, control, None, None, 4, 1, "print"),
        cmap=transfers,
    )
