"""Finding a circuit back to front, one path patching a group (Prakash et al. 2024, §3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head
from tl_entity.hooks.points import HeadInput
from tl_entity.methods.path_patching import Engine, HeadScores, path_patch
from tl_entity.results import ROWS_SHOWN, Label, Result
from tl_entity.tasks.batches import PairBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_entity.plots.heatmaps import HeadMap


@dataclass(frozen=True)
class Stage:
    """One step of a discovery: the group found, where its heads sit, and what they are found by.

    Attributes:
        group: name of the group found.
        position: named position of its heads.
        into: group found earlier whose input is patched; None for the logits.
        receiver_input: which input of those heads; None for the logits.
    """

    group: str
    position: str
    into: str | None = None
    receiver_input: HeadInput | None = None


ENTITY_TRACKING_STAGES: tuple[Stage, ...] = (
    Stage("value_fetcher", "last"),
    Stage("pos_transmitter", "last", into="value_fetcher", receiver_input="q"),
    Stage("pos_detector", "query_label", into="pos_transmitter", receiver_input="v"),
    Stage("struct_reader", "previous_query_label", into="pos_detector", receiver_input="v"),
)
"""The four stages by which the paper finds the entity-tracking circuit."""


Overlaps = Literal["stronger", "later"]
"""Which of two groups at one position a head belongs to that both choose: the one for which there
is stronger evidence, or the one found later (the paper's choice)."""


@dataclass(frozen=True)
class Discovery(Result):
    """A circuit, the scores it was chosen by, and how it was looked for.

    Attributes:
        circuit: the heads found.
        scores: the path patching of each group.
        receivers: the heads of each group that later stages patched into.
        stages: what was looked for, in order.
        candidates: the heads that each group chose, those that another one got among them.
    """

    circuit: Circuit
    scores: Mapping[str, HeadScores]
    receivers: Mapping[str, tuple[Head, ...]]
    stages: tuple[Stage, ...] = ENTITY_TRACKING_STAGES
    candidates: Mapping[str, tuple[Head, ...]] = field(default_factory=dict[str, tuple[Head, ...]])

    def __str__(self) -> str:
        return str(self.circuit)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each head in each group's score map: score, its 95 % interval, its rank, and
        whether the group has it."""
        import pandas as pd

        frames = []
        for group in self.circuit:
            frame = self.scores[group.name].to_dataframe()
            chosen = frame["head"].isin([str(head) for head in group.heads])
            frame.insert(0, "group", group.name)
            frame.insert(1, "position", group.position)
            frames.append(frame.assign(chosen=chosen))
        return pd.concat(frames, ignore_index=True)

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The circuit's heads, group by group, the most important first: at most `n` of each."""
        import pandas as pd

        rows = self.to_dataframe()
        rows = rows.loc[rows["chosen"]].sort_values(by="rank")
        most = len(rows) if n is None else n
        parts = [rows.loc[rows["group"] == group.name].head(most) for group in self.circuit]
        return pd.concat(parts, ignore_index=True).drop(columns=["layer", "index", "chosen"])

    def to_json(self) -> dict[str, Any]:
        """Each group's path patching, with the group whose input was patched (null for the
        logits)."""
        return {
            group.name: {
                **self.scores[group.name].to_json(),
                "into": self._receiving_group(group.name),
            }
            for group in self.circuit
        }

    def plot(
        self,
        *,
        known: Circuit | None = None,
        title: str = "Path patching",
        panel_titles: Mapping[str, str] | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> "go.Figure":
        """Every group's score map, with the heads chosen outlined; dashed are those that the group
        chose too and another one at its position has.

        Args:
            known: heads to mark with a dot, by group.
            title: above all.
            panel_titles: above each group's map; says what was patched if left out.
            limits: each group's colour limit; see `stage_heatmaps`.
        """
        from tl_entity.plots.heatmaps import stage_heatmaps

        titles = panel_titles or {}
        panels = [
            self.panel(group.name, known=known, title=titles.get(group.name))
            for group in self.circuit
        ]
        of_each = None if limits is None else [limits[group.name] for group in self.circuit]
        return stage_heatmaps(panels, title=title, limits=of_each)

    def panel(
        self, group: str, *, known: Circuit | None = None, title: str | None = None
    ) -> "HeadMap":
        """One group's map, as `plot` shows it beside the others.

        Args:
            group: the group's name.
            known: heads to mark with a dot, by group.
            title: above the map; says what was patched if left out.
        """
        dots = {} if known is None else {each.name: each.heads for each in known}
        chosen = self.circuit[group]
        return self.scores[group].panel(
            chosen=chosen,
            known=dots.get(group, ()),
            elsewhere=[head for head in self.candidates.get(group, ()) if head not in chosen],
            title=f"{group}: {self._path(group)}" if title is None else title,
        )

    def diagram(
        self,
        words: Sequence[str],
        positions: Mapping[str, int],
        *,
        title: str = "The circuit",
        label: Label = str,
        carried: Mapping[str, str] | None = None,
    ) -> "go.Figure":
        """The circuit over a prompt: each group above its token, arrows along the patched paths.

        Args:
            words: the prompt's tokens, as text.
            positions: the index of each named position among them.
            title: above the figure.
            label: what the groups are called in it.
            carried: what groups carry, in a few words.

        Raises:
            InputError: if a group's position is missing or is no token of the prompt.
        """
        from tl_entity.plots.circuit_diagram import Edge, Node, circuit_diagram

        nodes, edges, says = [], [], carried or {}
        for group in self.circuit:
            if group.position not in positions:
                raise InputError(f"Say which token is at {group.position!r}.")
            name, at = label(group.name), positions[group.position]
            nodes.append(Node(name, at, group.heads, says.get(group.name, "")))
            into = self._receiving_group(group.name)
            found = self.scores[group.name]
            target = None if into is None else label(into)
            edges.append(Edge(name, target, found.receiver_input or "logits"))
        return circuit_diagram(words, nodes, edges, title=title)

    def _receiving_group(self, name: str) -> str | None:
        """The group that a group was found by; None for the logits."""
        for stage in self.stages:
            if stage.group == name:
                return stage.into
        raise InputError(f"No stage of this discovery finds a group {name}.")

    def _path(self, name: str) -> str:
        found, into = self.scores[name], self._receiving_group(name)
        reached = "the logits" if into is None else f"{found.receiver_input} of {into}"
        return f"{found.position} into {reached}"


@checked
def discover_circuit(
    model: Model,
    pairs: PairBatch,
    *,
    sizes: Mapping[str, int],
    receiver_sizes: Mapping[str, int] | None = None,
    stages: Sequence[Stage] = ENTITY_TRACKING_STAGES,
    overlaps: Overlaps = "stronger",
    engine: Engine = "exact",
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
    score_stage: Callable[..., HeadScores] = path_patch,
) -> Discovery:
    """Find a circuit stage by stage (Prakash et al. 2024, §3.2).

    Each stage scores all heads by path patching into the logits or into heads found before, and
    keeps the most important ones, of those whose 95 % interval lies below zero. So a group can come
    out smaller than asked for, and even empty; nothing can then be found by patching into it. (A
    single pair has no interval, and heads are chosen by score alone.)

    Args:
        model: the model.
        pairs: clean and corrupt prompts with every position the stages name.
        sizes: how many heads each group keeps.
        receiver_sizes: how many of a group, the most important first, the next stage patches into;
            for groups left out, as many as it keeps.
        stages: what is found, in order; the paper's four by default.
        overlaps: which group has a head that two at one position choose: "stronger", the one in
            whose scores it lies more standard errors below zero, or "later", the one further from
            the output (the paper's).
        engine: as in `path_patch`.
        batch_size: as in `path_patch`.
        memory: as in `path_patch`.
        progress: as in `path_patch`, over all stages.
        score_stage: what scores a stage, called as `path_patch` is; a place to keep finished
            stages.

    Raises:
        InputError: if a group has no size, a size is below one or above the number of heads, a
            stage patches into a group that is not found before it, or as `path_patch`.
    """
    receiver_sizes = receiver_sizes or {}
    _check_stages(stages)
    check_sizes(model, stages, sizes)
    check_sizes(model, [stage for stage in stages if stage.group in receiver_sizes], receiver_sizes)
    scores: dict[str, HeadScores] = {}
    receivers: dict[str, tuple[Head, ...]] = {}
    for stage in stages:
        found = score_stage(
            model,
            pairs,
            position=stage.position,
            receivers=None if stage.into is None else receivers[stage.into],
            receiver_input=stage.receiver_input,
            engine=engine,
            batch_size=batch_size,
            memory=memory,
            progress=progress,
        )
        scores[stage.group] = found
        receivers[stage.group] = found.found(receiver_sizes.get(stage.group, sizes[stage.group]))
    return Discovery(
        circuit=choose_heads(scores, sizes, stages, overlaps=overlaps),
        scores=scores,
        receivers=receivers,
        stages=tuple(stages),
        candidates={stage.group: scores[stage.group].found(sizes[stage.group]) for stage in stages},
    )


@checked
def choose_heads(
    scores: Mapping[str, HeadScores],
    sizes: Mapping[str, int],
    stages: Sequence[Stage],
    *,
    overlaps: Overlaps = "stronger",
) -> Circuit:
    """The circuit of each stage's most important heads, of those whose interval lies below zero. A
    head that two groups at one position choose belongs to one of them, as `overlaps` says, and the
    other is the smaller for it."""
    chosen = {stage.group: scores[stage.group].found(sizes[stage.group]) for stage in stages}

    def owner(head: Head, position: str) -> str:
        rivals = [s.group for s in stages if s.position == position and head in chosen[s.group]]
        if overlaps == "later":
            return rivals[-1]
        return max(rivals, key=lambda group: scores[group].evidence[head])

    return Circuit(
        tuple(
            Group(
                stage.group,
                stage.position,
                tuple(h for h in chosen[stage.group] if owner(h, stage.position) == stage.group),
            )
            for stage in stages
        )
    )


@checked
def check_sizes(model: Model, stages: Sequence[Stage], sizes: Mapping[str, int]) -> None:
    """Make sure that every group has a size the model can fill.

    Raises:
        InputError: naming the group whose size is missing, below one, or above the head count.
    """
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    unknown = set(sizes) - {stage.group for stage in stages}
    if unknown:
        raise InputError(f"No stage finds a group {', '.join(sorted(unknown))}.")
    for stage in stages:
        size = sizes.get(stage.group)
        if size is None:
            raise InputError(f"Say how many heads the group {stage.group} keeps.")
        if not 1 <= size <= n_heads:
            raise InputError(
                f"The group {stage.group} can't have {size} heads: the model has {n_heads}, "
                "and at least one is needed."
            )


def _check_stages(stages: Sequence[Stage]) -> None:
    found: set[str] = set()
    for stage in stages:
        if stage.into is not None and stage.into not in found:
            raise InputError(
                f"Stage {stage.group} patches into {stage.into}, which no stage before it finds."
            )
        found.add(stage.group)
