"""Finding a circuit back to front, one path patching a group (Prakash et al. 2024, §3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head
from tl_entity.hooks.points import HeadInput, check_heads
from tl_entity.hooks.vocabulary import check_pairs
from tl_entity.methods.path_patching import HeadScores, MLPScores, path_patch, path_patch_mlps
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.results import ROWS_SHOWN, Label, Result
from tl_entity.runs.runner import Runner, RunSettings
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch
from tl_entity.tasks.fingerprint import fingerprint as fingerprint

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
        sizes: how many heads, or MLPs, each group was to have.
        receiver_sizes: how many heads of a group later stages were to patch into, where not as many
            as it has.
        overlaps: which group got a head that two at one position chose.
        metric: what runs were scored by.
        pairs: a fingerprint of the pairs: equal only for the same prompts, positions and targets.
        mlp_scores: the path patching of each group of MLPs.
        mlps: the layers of the MLPs found, by group.
    """

    circuit: Circuit
    scores: Mapping[str, HeadScores]
    receivers: Mapping[str, tuple[Head, ...]]
    stages: tuple[Stage, ...] = ENTITY_TRACKING_STAGES
    candidates: Mapping[str, tuple[Head, ...]] = field(default_factory=dict[str, tuple[Head, ...]])
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    receiver_sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    overlaps: Overlaps = "stronger"
    metric: str = RELATIVE_PROBABILITY.name
    pairs: str = ""
    mlp_scores: Mapping[str, MLPScores] = field(default_factory=dict[str, MLPScores])
    mlps: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def __str__(self) -> str:
        mlps = [f"{name}: MLPs of layers {list(layers)}" for name, layers in self.mlps.items()]
        return "; ".join([str(self.circuit), *mlps])

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each head in each group's score map: score, its 95 % interval, its rank, and
        whether the group has it. Groups of MLPs have theirs in `mlp_scores`."""
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
                "into": self.stage(group.name).into,
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
            title=f"{group}: {self.stage(group).path}" if title is None else title,
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
            into = self.stage(group.name).into_inputs
            edges += [Edge(name, label(target), which) for target, which in into]
            if not into:
                edges.append(Edge(name, None, "logits"))
        return circuit_diagram(words, nodes, edges, title=title)

    def stage(self, group: str) -> Stage:
        """The stage that found a group.

        Raises:
            InputError: if there is none.
        """
        for stage in self.stages:
            if stage.group == group:
                return stage
        raise InputError(f"No stage of this discovery finds a group {group}.")


@checked
def discover_circuit(
    model: Model,
    pairs: PairBatch,
    *,
    sizes: Mapping[str, int],
    receiver_sizes: Mapping[str, int] | None = None,
    stages: Sequence[Stage] = ENTITY_TRACKING_STAGES,
    overlaps: Overlaps = "stronger",
    metric: Metric = RELATIVE_PROBABILITY,
    score_stage: Callable[..., HeadScores] = path_patch,
    **how: Unpack[RunSettings],
) -> Discovery:
    """Find a circuit stage by stage (Prakash et al. 2024, §3.2).

    Each stage scores all heads by path patching into the logits or into heads found before, and
    keeps the most important ones, of those whose 95 % interval lies below zero. So a group can come
    out smaller than asked for, and even empty; nothing can then be found by patching into it. (A
    single pair has no interval, and heads are chosen by score alone.)

    Heads are patched into at the stage's own position, where with attention held all of the change
    is. So the receivers may be at a later token, that reads this one: then it is their k or v that
    can carry it there, never their q.

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
        metric: as in `path_patch`; the lower a head's score, the more important it is.
        score_stage: what scores a stage of heads, called as `path_patch` is; a place to keep
            finished stages.
        how: as in `path_patch`, over all stages.

    Raises:
        InputError: if a group has no size, a size is below one or above the number of heads, a
            stage patches into a group that is not found before it or to which there is no path, or
            as `path_patch`.
    """
    receiver_sizes = receiver_sizes or {}
    check_pairs(model, pairs)
    _check_stages(model, stages, pairs)
    check_sizes(model, stages, sizes)
    check_sizes(model, [stage for stage in stages if stage.group in receiver_sizes], receiver_sizes)
    scores: dict[str, HeadScores] = {}
    mlp_scores: dict[str, MLPScores] = {}
    receivers: dict[str, tuple[Head, ...]] = {}
    called = _called(metric, Runner.of(**how))
    for stage in stages:
        patch: dict[str, Any] = {"position": stage.position, **_receivers(stage, receivers)}
        if stage.mlps:
            mlp_scores[stage.group] = path_patch_mlps(model, pairs, **patch, **called)
            continue
        found = score_stage(model, pairs, **patch, **called)
        scores[stage.group] = found
        size = receiver_sizes.get(stage.group, sizes[stage.group])
        receivers[stage.group] = _found(found, size, stage)
    return Discovery(
        circuit=choose_heads(scores, sizes, stages, overlaps=overlaps),
        scores=scores,
        receivers=receivers,
        stages=tuple(stages),
        candidates={
            stage.group: _found(scores[stage.group], sizes[stage.group], stage)
            for stage in stages
            if not stage.mlps
        },
        sizes=dict(sizes),
        receiver_sizes=dict(receiver_sizes),
        overlaps=overlaps,
        metric=metric.name,
        pairs=fingerprint(pairs),
        mlp_scores=mlp_scores,
        mlps={group: found.found(sizes[group]) for group, found in mlp_scores.items()},
    )


def _called(metric: Metric, runner: Runner) -> dict[str, Any]:
    """What a stage is scored with, besides the path."""
    settings: dict[str, Any] = {
        "engine": runner.engine,
        "batch_size": runner.batch_size,
        "memory": runner.memory,
        "progress": runner.progress,
    }
    if not runner.ranks:
        settings["ranks"] = False
    # The paper's metric goes unsaid, for functions that know no other.
    return settings if metric is RELATIVE_PROBABILITY else {**settings, "metric": metric}


def _receivers(stage: Stage, found: Mapping[str, tuple[Head, ...]]) -> dict[str, Any]:
    """The heads that a stage patches into, as `path_patch` takes them."""
    if len(stage.into_inputs) <= 1:
        heads = [found[group] for group, _ in stage.into_inputs]
        inputs = [which for _, which in stage.into_inputs]
        return {"receivers": heads[0] if heads else None, "receiver_input": (*inputs, None)[0]}
    by_input: dict[HeadInput, tuple[Head, ...]] = {}
    for group, which in stage.into_inputs:
        by_input[which] = tuple(dict.fromkeys((*by_input.get(which, ()), *found[group])))
    return {"receivers": by_input, "receiver_input": None}


def _found(scores: HeadScores, n: int, stage: Stage) -> tuple[Head, ...]:
    """Those of a stage's `n` most important senders whose interval lies below zero."""
    if stage.senders is None:
        return scores.found(n)
    ranked = [head for head in scores.ranked() if head in stage.senders][:n]
    below_zero = set(scores.found(scores.scores.numel()))
    return tuple(head for head in ranked if head in below_zero)


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
    stages = [stage for stage in stages if not stage.mlps]
    chosen = {s.group: _found(scores[s.group], sizes[s.group], s) for s in stages}

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


def _check_stages(model: Model, stages: Sequence[Stage], pairs: PairBatch) -> None:
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
