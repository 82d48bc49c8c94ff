"""Finding a circuit back to front, one path patching a group (Prakash et al. 2024, §3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head
from tl_entity.hooks.points import HeadInput
from tl_entity.hooks.vocabulary import check_pairs
from tl_entity.methods.path_patching import HeadScores, MLPScores, path_patch, path_patch_mlps
from tl_entity.methods.stages import ENTITY_TRACKING_STAGES as ENTITY_TRACKING_STAGES
from tl_entity.methods.stages import Stage as Stage
from tl_entity.methods.stages import check_sizes as check_sizes
from tl_entity.methods.stages import check_stages
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.results import ROWS_SHOWN, Label, Result, plain
from tl_entity.runs.runner import Runner, RunSettings
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.fingerprint import fingerprint as fingerprint

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_entity.plots.heatmaps import HeadMap


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
        logits), and further ones where there are some."""
        found: dict[str, Any] = {}
        for group in self.circuit:
            stage = self.stage(group.name)
            further = {"edges": plain(stage.edges)} if stage.edges else {}
            scores = self.scores[group.name].to_json()
            input_of_it = {"receiver_input": stage.receiver_input} if stage.edges else {}
            found[group.name] = {**scores, **input_of_it, "into": stage.into, **further}
        return found

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
    check_stages(model, stages, pairs)
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
