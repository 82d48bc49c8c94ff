"""Is a gain made below a layer or above it? One model below and another above, in all four ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import check_supported, unembed
from tl_entity.exact.memory import halving, memory_budget, prompts_within
from tl_entity.finite import are_finite
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import HookFunction, answer_logits, must_fire, record
from tl_entity.hooks.watch import ScoreWatch
from tl_entity.methods.circuits import BATCH_SIZE
from tl_entity.methods.gains import scored_pairs
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import LOG_PROBABILITY, Metric
from tl_entity.ranks import shared_out
from tl_entity.results import Result
from tl_entity.stats import Interval, mean_intervals, wilson_interval
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Over = Literal["resid_pre", "attn_out", "mlp_out"]
"""What is exchanged: the residual stream ahead of a layer, or what its heads or its MLP write."""

CORNERS = ("base, base", "tuned, base", "base, tuned", "tuned, tuned")
"""Which model is below, and which above."""

BASE, TUNED_BELOW, TUNED_ABOVE, TUNED = range(4)
"""The places of the corners."""

EFFECTS = ("below", "above", "interaction")
"""What the four corners are taken apart into."""


@checked
@dataclass(frozen=True)
class FourCorners(Result):
    """The four ways of putting two models together at every layer.

    Attributes:
        change: the metric's change from the base model, in the order of `CORNERS`. Its first axis
            is the layer; of the residual stream there is one entry more, for all layers below.
        correct: whether the most likely token is the target.
        over: what is exchanged.
        position: the named position at which it is; None for all tokens.
        metric: the metric's name.
    """

    change: Float[Tensor, "layer 4 batch"]
    correct: Bool[Tensor, "layer 4 batch"]
    over: Over
    position: str | None
    metric: str

    def __str__(self) -> str:
        where = "all tokens" if self.position is None else self.position
        below, above, interaction = self.effects.mean(-1).T
        best = int(below.abs().argmax())
        return (
            f"{self.over} at {where}, {self.change.shape[-1]} prompts: gain "
            f"{float(self.change[0, TUNED].mean()):+.3f}; largest effect below, of layer {best}: "
            f"{float(below[best]):+.3f}, above {float(above[best]):+.3f}, "
            f"interaction {float(interaction[best]):+.3f}"
        )

    @property
    def effects(self) -> Float[Tensor, "layer 3 batch"]:
        """For each prompt what the tuned model brings below (the mean over which model is above),
        above (the mean over which is below), and their interaction.

        Below and above sum to the gain. The interaction is what both bring together beyond what
        each brings alone.
        """
        base, tuned_below, tuned_above, tuned = self.change.unbind(1)
        below = ((tuned_below - base) + (tuned - tuned_above)) / 2
        above = ((tuned_above - base) + (tuned - tuned_below)) / 2
        return torch.stack([below, above, tuned - tuned_below - tuned_above + base], 1)

    @property
    def effect_intervals(self) -> Float64[np.ndarray, "layer 3 2"]:
        """95 % interval of each mean effect, over prompts."""
        return mean_intervals(self.effects.double().cpu().numpy())

    def accuracy(self, layer: int, corner: int) -> float:
        """Share of prompts answered right."""
        return float(self.correct[layer, corner].double().mean())

    def accuracy_interval(self, layer: int, corner: int) -> Interval:
        """Wilson's 95 % interval of the accuracy."""
        right = self.correct[layer, corner]
        return wilson_interval(int(right.sum()), len(right))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer: mean change and accuracy of each corner; effects with intervals."""
        import pandas as pd

        effects, bounds = self.effects.mean(-1).tolist(), self.effect_intervals
        rows: list[dict[str, float]] = []
        for layer, change in enumerate(self.change.mean(-1).tolist()):
            row: dict[str, float] = {"layer": layer}
            for corner, name in enumerate(CORNERS):
                low, high = self.accuracy_interval(layer, corner)
                row |= {
                    f"{name}: change": change[corner],
                    f"{name}: accuracy": self.accuracy(layer, corner),
                    f"{name}: low": low,
                    f"{name}: high": high,
                }
            for index, name in enumerate(EFFECTS):
                low, high = bounds[layer, index]
                row |= {name: effects[layer][index], f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def table(self, n: int | None = None) -> "pd.DataFrame":
        """Main effects and interaction by layer, with intervals."""
        columns = [f"{name}{end}" for name in EFFECTS for end in ("", "_low", "_high")]
        rows = self.to_dataframe().loc[:, ["layer", *columns]]
        return rows if n is None else rows.head(n)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Main effects and interaction by layer, with 95 % intervals."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.gain import Line, lines

        effects, bounds = self.effects.mean(-1).tolist(), self.effect_intervals
        layers = tuple(float(layer) for layer in range(len(effects)))
        found = [
            Line(
                "interaction" if name == "interaction" else f"tuned {name}",
                layers,
                tuple(Bar(row[i], *bounds[j, i].tolist()) for j, row in enumerate(effects)),
            )
            for i, name in enumerate(EFFECTS)
        ]
        where = "all tokens" if self.position is None else self.position
        return lines(
            found,
            title=f"{self.over} exchanged at {where}" if title is None else title,
            x_axis="layer",
            y_axis=self.metric,
        )

    def plot_corners(self, *, title: str | None = None) -> "go.Figure":
        """Accuracy of the four corners by layer, with 95 % intervals."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.gain import Line, lines

        layers = range(len(self.correct))
        found = [
            Line(
                f"{below} below, {above} above",
                tuple(map(float, layers)),
                tuple(
                    Bar(self.accuracy(layer, corner), *self.accuracy_interval(layer, corner))
                    for layer in layers
                ),
            )
            for corner, (below, above) in enumerate(name.split(", ") for name in CORNERS)
        ]
        where = "all tokens" if self.position is None else self.position
        return lines(
            found,
            title=f"{self.over} exchanged at {where}" if title is None else title,
            x_axis="layer",
            y_axis="accuracy",
            proportion=True,
        )


@checked
@torch.no_grad()
def four_corners(
    base: Model,
    tuned: Model,
    prompts: PromptBatch | PairBatch,
    *,
    over: Over = "resid_pre",
    position: str | None = None,
    metric: Metric = LOG_PROBABILITY,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
) -> FourCorners:
    """Base or tuned model below, base or tuned model above, for every layer.

    The model above runs the prompt, and what is exchanged takes the value that the model below
    computes on the same prompt: the residual stream ahead of layer l (all that comes before l is
    then the other model's), or what the heads or the MLP of layer l write. At a named position only
    this token's value is exchanged.

    Args:
        base: the model before.
        tuned: the model after.
        prompts: prompts, whose answers are scored; or pairs, for metrics that need more: the clean
            prompts are run, and their targets and foils scored.
        over: "resid_pre", with one entry more than there are layers, for the stream behind the last
            one; "attn_out"; or "mlp_out".
        position: a named position; all tokens if left out.
        metric: how runs are scored.
        engine: "exact" runs only the layers from the exchange on; "hooks" runs the whole model.
        batch_size: prompts run together, at most.

    Raises:
        InputError: if the models differ in architecture or tokenizer; there is no such position; a
            prompt has no answer; or the exact engine does not fit a model.
    """
    check_same_architecture(base, tuned)
    pairs = scored_pairs(base, prompts)
    scored_pairs(tuned, prompts)  # what only one of the models knows
    if position is not None:
        pairs.clean.position(position)
    if engine == "exact":
        check_supported(base)
        check_supported(tuned)
    size = prompts_within(base.cfg, 4 * pairs.clean.tokens.shape[1], memory_budget(base.cfg.device))

    def compute(chunk: PairBatch) -> tuple[Tensor, Tensor]:
        runs = _Runs.record((base, tuned), chunk.clean, over, position, engine)
        alone = [runs.alone(which) for which in range(2)]
        change: list[Tensor] = []
        right: list[Tensor] = []
        for at in range(len(runs.exchanged[0])):
            logits = [alone[0], runs.logits(1, 0, at), runs.logits(0, 1, at), alone[1]]
            values = [metric.of_logits(some, chunk) for some in logits]
            change.append(torch.stack([metric.change(v, values[BASE]) for v in values]))
            right.append(torch.stack([some.argmax(-1) == chunk.targets for some in logits]))
        return torch.stack(change), torch.stack(right)

    def compute_mine(mine: PairBatch) -> tuple[Tensor, Tensor]:
        parts = [some for _, some in halving(mine, min(batch_size, size), compute)]
        return torch.cat([c for c, _ in parts], -1), torch.cat([r for _, r in parts], -1)

    with guarded(base, tuned):
        change, correct = shared_out(pairs, compute_mine)
    return FourCorners(change, correct, over, position, metric.name)


@dataclass(frozen=True)
class _Runs:
    """Both models' runs on some prompts, and what is exchanged between them.

    Attributes:
        models: base and tuned.
        prompts: the prompts.
        over: what is exchanged.
        position: where; None for all tokens.
        engine: what runs an exchange.
        streams: for each model the residual stream ahead of every layer, and behind the last.
        exchanged: for each model what is exchanged, by layer.
    """

    models: tuple[Model, Model]
    prompts: PromptBatch
    over: Over
    position: str | None
    engine: Engine
    streams: Sequence[Sequence[Tensor]]
    exchanged: Sequence[Sequence[Tensor]]

    @classmethod
    def record(
        cls,
        models: tuple[Model, Model],
        prompts: PromptBatch,
        over: Over,
        position: str | None,
        engine: Engine,
    ) -> "_Runs":
        n_layers = models[0].cfg.n_layers
        streams: list[list[Tensor]] = []
        exchanged: list[list[Tensor]] = []
        for model in models:
            of_streams = [_point("resid_pre", layer, n_layers) for layer in range(n_layers + 1)]
            points = of_streams
            if over != "resid_pre":
                points = [_point(over, layer, n_layers) for layer in range(n_layers)]
            here = prompts.to(model.cfg.device or "cpu")
            cache = record(model, here, dict.fromkeys([*of_streams, *points]))
            streams.append([cache[name] for name in of_streams])
            exchanged.append([cache[name] for name in points])
        return cls(models, prompts, over, position, engine, streams, exchanged)

    def alone(self, which: int) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the answer position of one model by itself."""
        model = self.models[which]
        found = answer_logits(model, self.prompts.to(model.cfg.device or "cpu"))
        return found.to(self.prompts.tokens.device)

    def logits(self, below: int, above: int, at: int) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the answer position of one model that takes another's value in a layer."""
        model = self.models[above]
        here = self.prompts.to(model.cfg.device or "cpu")
        own = self.exchanged[above][at]
        value = self.exchanged[below][at].to(own)
        rows = torch.arange(len(own), device=own.device)
        if self.position is not None:
            place = here.position(self.position).to(own.device)
            own = own.clone()
            own[rows, place] = value[rows, place]
            value = own

        def replace(activation: Tensor, hook: Any) -> Tensor:
            return value

        n_layers = model.cfg.n_layers
        hooks: list[tuple[str, HookFunction]] = [(_point(self.over, at, n_layers), replace)]
        if self.engine == "hooks":
            logits = answer_logits(model, here, hooks)
        else:
            in_stream = self.over == "resid_pre"
            scores = ScoreWatch(here.mask)
            with must_fire(model, [] if in_stream else hooks) as watched:
                final = model.run_with_hooks(
                    value if in_stream else self.streams[above][at],
                    start_at_layer=at,
                    stop_at_layer=n_layers,
                    attention_mask=here.mask.long(),
                    fwd_hooks=[scores.ahead, *watched, scores.behind],
                )
            last = here.position(ANSWER_POSITION).to(final.device)
            logits = unembed(model, final[rows.to(final.device), last])
            if not (scores.is_finite and are_finite([logits])):
                logits = answer_logits(model, here, hooks)  # says from where on they are not
        return logits.to(self.prompts.tokens.device)


def _point(over: str, layer: int, n_layers: int) -> str:
    """The hook point of a layer; of the stream behind the last layer too."""
    if layer == n_layers:
        return hook_point("resid_post", n_layers - 1)
    return hook_point(over, layer)
