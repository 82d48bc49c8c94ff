"""The stages of a discovery: which group is found where, and by patching into what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head
from tl_entity.hooks.points import HeadInput, check_heads
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch


@dataclass(frozen=True)
class Stage:
    """One step of a discovery: the group found, where its heads sit, and what they are found by.

    Attributes:
        group: name of the group found.
        position: named position of its heads.
        into: group found earlier whose input is patched; None for the logits.
        receiver_input: which input of those heads; None for the logits.
        edges: further groups found earlier, and which of their inputs are patched together with
            that one.
        senders: the heads that the group may have; None for all.
        mlps: whether the group is one of MLPs, not of heads.

    Raises:
        InputError: if a group is named without its input or the other way round, or MLPs are to be
            chosen among heads.
    """

    group: str
    position: str
    into: str | None = None
    receiver_input: HeadInput | None = None
    edges: tuple[tuple[str, HeadInput], ...] = ()
    senders: tuple[Head, ...] | None = None
    mlps: bool = False

    def __post_init__(self) -> None:
        if (self.into is None) != (self.receiver_input is None):
            raise InputError(
                f"Stage {self.group}: into and receiver_input go together; give both or neither."
            )
        if self.mlps and self.senders is not None:
            raise InputError(f"Stage {self.group} finds MLPs, so it has no heads as senders.")

    @property
    def into_inputs(self) -> tuple[tuple[str, HeadInput], ...]:
        """All groups patched into, each with the input that is patched; none for the logits."""
        if self.into is None or self.receiver_input is None:
            return self.edges
        return ((self.into, self.receiver_input), *self.edges)

    @property
    def path(self) -> str:
        """The path in words, such as "last into q of value_fetcher"."""
        reached = " and ".join(f"{which} of {group}" for group, which in self.into_inputs)
        return f"{self.position} into {reached or 'the logits'}"


ENTITY_TRACKING_STAGES: tuple[Stage, ...] = (
    Stage("value_fetcher", "last"),
    Stage("pos_transmitter", "last", into="value_fetcher", receiver_input="q"),
    Stage("pos_detector", "query_label", into="pos_transmitter", receiver_input="v"),
    Stage("struct_reader", "previous_query_label", into="pos_detector", receiver_input="v"),
)
"""The four stages by which the paper finds the entity-tracking circuit."""


@checked
def check_sizes(model: Model, stages: Sequence[Stage], sizes: Mapping[str, int]) -> None:
    """Make sure that every group has a size the model can fill.

    Raises:
        InputError: naming the group whose size is missing, below one, or above the head count.
    """
    unknown = set(sizes) - {stage.group for stage in stages}
    if unknown:
        raise InputError(f"No stage finds a group {', '.join(sorted(unknown))}.")
    for stage in stages:
        size = sizes.get(stage.group)
        if size is None:
            raise InputError(f"Say how many heads the group {stage.group} keeps.")
        what = "MLPs" if stage.mlps else "heads"
        n, whose = model.cfg.n_layers, "the model has"
        if stage.senders is not None:
            n, whose = len(set(stage.senders)), "its stage names"
        elif not stage.mlps:
            n *= model.cfg.n_heads
        if not 1 <= size <= n:
            raise InputError(
                f"The group {stage.group} can't have {size} {what}: {whose} {n}, "
                "and at least one is needed."
            )


@checked
def check_stages(model: Model, stages: Sequence[Stage], pairs: PairBatch) -> None:
    """Make sure that every stage patches into groups found before it, to which there is a path.

    Raises:
        InputError: naming the stage for which this is not so.
    """
    found: dict[str, Stage] = {}
    for stage in stages:
        check_heads(model, stage.senders or ())
        for group, which in stage.into_inputs:
            if group not in found:
                raise InputError(
                    f"Stage {stage.group} patches into {group}, which no stage before it finds."
                )
            if found[group].mlps:
                raise InputError(
                    f"Stage {stage.group} patches into {group}, a group of MLPs; only the q, k and "
                    "v of heads can be patched into."
                )
            _check_path(pairs.clean, stage, found[group], which)
        if not stage.into_inputs:
            sender, answer = (pairs.clean.position(at) for at in (stage.position, ANSWER_POSITION))
            if not bool((sender == answer).any()):
                raise InputError(
                    f"Stage {stage.group}: with attention held, nothing at {stage.position!r} "
                    "reaches the logits, which are read at another token in every pair; patch into "
                    "heads found before."
                )
        found[stage.group] = stage


def _check_path(prompts: PromptBatch, stage: Stage, into: Stage, which: HeadInput) -> None:
    """Make sure that in some prompt a change at the stage's token can act on the receivers."""
    sender, receiver = prompts.position(stage.position), prompts.position(into.position)
    path = f"{which} of {into.group} at {into.position!r}"
    if which == "q" and not bool((sender == receiver).any()):
        raise InputError(
            f"Stage {stage.group}: with attention held, nothing at {stage.position!r} reaches the "
            f"{path}, which is another token in every pair; patch their k or v, which they read "
            "there."
        )
    if not bool((sender <= receiver).any()):
        raise InputError(
            f"Stage {stage.group}: the {path} never see {stage.position!r}, which comes later in "
            "every pair."
        )
