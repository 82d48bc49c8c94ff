"""Attention knockout: where information flows, seen in what breaks when one token no longer sees
another (Prakash et al. 2024, appendix)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.edits import knock_out
from tl_entity.hooks.vocabulary import check_prompts
from tl_entity.methods.circuits import Evaluation, evaluate_each
from tl_entity.metrics import Metric
from tl_entity.results import Label, Result
from tl_entity.runs.runner import Runner, RunSettings
from tl_entity.runs.variants import Edits
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONTROL = "random token"
"""Begins the names of the positions that the control knocks out."""


@dataclass(frozen=True)
class KnockoutCurve(Result):
    """How often the model answers right when one token no longer sees another, from some layer up.

    Attributes:
        from_position: the token that looks.
        to_position: the token that it can no longer see.
        evaluations: for each layer, with attention knocked out in it and all layers above.
        whole: with nothing knocked out.
        controls: the same as `evaluations` for random tokens in place of `to_position`, one curve
            a draw; empty if there is no control.
        seed: what the random tokens were drawn by; None without a control.
    """

    from_position: str
    to_position: str
    evaluations: tuple[Evaluation, ...]
    whole: Evaluation
    controls: tuple[tuple[Evaluation, ...], ...] = ()
    seed: int | None = None

    def __str__(self) -> str:
        lowest = self.evaluations[0]
        text = (
            f"{self.from_position} no longer sees {self.to_position}: accuracy "
            f"{lowest.accuracy:.3f} {lowest.interval} in all layers, {self.whole.accuracy:.3f} "
            f"{self.whole.interval} in none"
        )
        if not self.controls:
            return text
        return f"{text}, {self.control_accuracy[:, 0].mean():.3f} for random tokens"

    @property
    def accuracy(self) -> Float64[np.ndarray, " layer"]:
        """Accuracy by first knocked-out layer."""
        return np.array([evaluation.accuracy for evaluation in self.evaluations])

    @property
    def intervals(self) -> Float64[np.ndarray, "layer 2"]:
        """Wilson's 95 % interval of each accuracy."""
        return np.array([evaluation.interval for evaluation in self.evaluations])

    @property
    def control_accuracy(self) -> Float64[np.ndarray, "draw layer"]:
        """Accuracy by draw and first knocked-out layer, with random tokens knocked out."""
        accuracies = [[found.accuracy for found in curve] for curve in self.controls]
        return np.array(accuracies, dtype=np.float64).reshape(
            len(self.controls), len(self.evaluations)
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a first knocked-out layer: counts, accuracy, its interval, and of the control
        the mean, lowest and highest accuracy of the draws. The last row, without a layer, is of
        the whole model."""
        import pandas as pd

        control = self.control_accuracy
        rows = []
        for layer, found in [*enumerate(self.evaluations), (None, self.whole)]:
            row = {
                "first_layer": layer,
                "from_position": self.from_position,
                "to_position": self.to_position,
                "correct": int(found.correct.sum()),
                "n_prompts": len(found),
                "accuracy": found.accuracy,
                "low": found.interval.low,
                "high": found.interval.high,
            }
            if self.controls:
                at = control[:, layer] if layer is not None else np.array([found.accuracy])
                row |= {
                    "control_accuracy": at.mean(),
                    "control_lowest": at.min(),
                    "control_highest": at.max(),
                }
            rows.append(row)
        return pd.DataFrame(rows).astype({"first_layer": "Int64"})

    def to_json(self) -> dict[str, Any]:
        """The two tokens, and by first knocked-out layer the accuracies with their intervals, and
        the control's mean, lowest and highest accuracy of the draws (none without a control)."""
        control = self.control_accuracy if self.controls else np.empty((1, 0))
        return {
            "from": self.from_position,
            "to": self.to_position,
            "whole": self.whole.to_json(),
            "layers": [found.to_json() for found in self.evaluations],
            "control": {
                "mean": control.mean(0).tolist(),
                "lowest": control.min(0).tolist(),
                "highest": control.max(0).tolist(),
            },
        }

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """Accuracy by first knocked-out layer; the control's mean, lowest and highest draw in the
        background, the whole model as a dashed line.

        Args:
            title: above the figure.
            label: what the positions are called in it.
        """
        return KnockoutCurves((self,)).plot(title=title, label=label)


@dataclass(frozen=True)
class KnockoutCurves(Result):
    """Attention knocked out between several pairs of tokens, in one model on the same prompts.

    Attributes:
        curves: one a pair of tokens.
    """

    curves: tuple[KnockoutCurve, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.curves))

    def to_dataframe(self) -> "pd.DataFrame":
        """The rows of every curve, one after another."""
        import pandas as pd

        return pd.concat([curve.to_dataframe() for curve in self.curves], ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """One entry a pair of tokens."""
        return {"curves": [curve.to_json() for curve in self.curves]}

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """Accuracy by first knocked-out layer, a curve a pair of tokens, as for a single one."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.curves import Curve, layer_curves

        drawn: list[Curve] = []
        for curve in self.curves:
            seer, seen = label(curve.from_position), label(curve.to_position)
            bars = tuple(Bar(found.accuracy, *found.interval) for found in curve.evaluations)
            drawn.append(Curve(f"{seer} to {seen}", bars))
            if curve.controls:
                layers = curve.control_accuracy.T
                control = tuple(Bar(layer.mean(), layer.min(), layer.max()) for layer in layers)
                name = f"{seer} to random tokens, not the {seen}"
                drawn.append(Curve(name, control, faint=True))
        whole = self.curves[0].whole
        return layer_curves(
            drawn,
            title="Attention knocked out from a layer up" if title is None else title,
            whole=Bar(whole.accuracy, *whole.interval),
            axis="first knocked-out layer",
        )


@checked
def knock_out_attention(
    model: Model,
    prompts: PromptBatch,
    *,
    from_position: str,
    to_position: str,
    **how: Unpack[RunSettings],
) -> Float[Tensor, " layer"]:
    """Accuracy by first knocked-out layer: entry l is with attention from one named token to
    another taken away, in every head, in layer l and all layers above.

    Arguments and errors are those of `knockout_curve`, which also gives counts, intervals and the
    control.
    """
    curve = knockout_curve(
        model, prompts, from_position=from_position, to_position=to_position, **how
    )
    return torch.tensor(curve.accuracy, dtype=torch.float32)


@checked
@torch.no_grad()
def knockout_curve(
    model: Model,
    prompts: PromptBatch,
    *,
    from_position: str,
    to_position: str,
    random_draws: int = 0,
    seed: int | None = None,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> KnockoutCurve:
    """Knock out attention from one named token to another, from each layer up (Prakash et al. 2024,
    appendix).

    The scores of `to_position`, as seen from `from_position`, are taken away before the softmax in
    every head of the first knocked-out layer and all layers above; what is left of the pattern is
    renormalised. While accuracy stays low, the information passes between the two tokens in that
    layer or above; where it is back at the whole model's, it has passed.

    For the control, each prompt loses sight of a random token in place of `to_position`
    (`random_earlier_tokens`): one ahead of `from_position` that is neither `to_position` nor the
    prompt's first token, on which many models rest the attention they have no use for.

    Args:
        model: the model.
        prompts: the prompts.
        from_position: named position of the token that looks.
        to_position: named position of the token that is hidden from it.
        random_draws: how many times the control draws random tokens; no control with 0.
        seed: of the random tokens; needed with a control.
        metric: what is read off the answers besides, as in `evaluate`.
        how: engine, batch_size, memory, progress, ranks or runner: see `Runner`. "exact" runs the
            prompts once and recomputes, for all first layers together, only what the knockout can
            change; "hooks" runs the whole model for each. One first layer on one prompt is a run;
            there are (n_layers * (1 + random_draws) + 1) * len(prompts).

    Raises:
        InputError: if a position is missing or `to_position` comes after `from_position` in a
            prompt, a token would be left with nothing to see, a prompt has no other token for the
            control or no answer, the control lacks a seed, the model does not know a token or has
            hooks attached to it, or the exact engine does not fit it.
        NotFiniteError: if weights, activations or logits are NaN or infinite, naming where.
    """
    if random_draws < 0 or (random_draws > 0 and seed is None):
        raise InputError("A control needs a positive number of draws and a seed.")
    check_prompts(model, prompts, answered=True)
    seer, seen = prompts.position(from_position), prompts.position(to_position)
    first = prompts.mask.int().argmax(1).to(seer)
    blind = (seer == seen) & (seer == first)
    if bool(blind.any()):
        raise InputError(
            f"{from_position!r} and {to_position!r} are the first token of prompt "
            f"{int(blind.nonzero()[0])}, which would be left with nothing to see."
        )
    hidden = [to_position]
    if random_draws and seed is not None:
        drawn = random_earlier_tokens(
            prompts,
            from_position=from_position,
            to_position=to_position,
            draws=random_draws,
            seed=seed,
        )
        control = {f"{CONTROL} {draw}": tokens for draw, tokens in enumerate(drawn)}
        prompts = replace(prompts, positions={**prompts.positions, **control})
        hidden += control
    n_layers = model.cfg.n_layers

    def edits_of(chunk: PromptBatch) -> list[Edits]:
        from_each_layer = (
            (name, range(layer, n_layers)) for name in hidden for layer in range(n_layers)
        )
        return [
            (),
            *(
                knock_out(chunk, from_position=from_position, to_position=name, layers=layers)
                for name, layers in from_each_layer
            ),
        ]

    whole, *found = evaluate_each(model, prompts, edits_of, Runner.of(**how), metric)
    curves = [tuple(found[i * n_layers : (i + 1) * n_layers]) for i in range(len(hidden))]
    return KnockoutCurve(
        from_position=from_position,
        to_position=to_position,
        evaluations=curves[0],
        whole=whole,
        controls=tuple(curves[1:]),
        seed=seed if random_draws else None,
    )


@checked
def random_earlier_tokens(
    prompts: PromptBatch, *, from_position: str, to_position: str, draws: int, seed: int
) -> Int[Tensor, "draw batch"]:
    """For each prompt random tokens ahead of `from_position`, other than `to_position` and the
    prompt's first.

    Args:
        prompts: the prompts.
        from_position: named position that they come before.
        to_position: named position that they are not at.
        draws: tokens drawn for each prompt, independent of each other.
        seed: the same seed gives the same tokens.

    Raises:
        InputError: if a prompt has no such token, or lacks a position.
    """
    tokens = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    first = prompts.mask.int().argmax(1)
    allowed = prompts.mask & (tokens < prompts.position(from_position)[:, None])
    for excluded in (prompts.position(to_position), first):
        allowed &= tokens != excluded[:, None]
    if not bool(allowed.any(1).all()):
        raise InputError(
            f"Prompt {int((~allowed.any(1)).nonzero()[0])} has no other token to knock out as a "
            "control."
        )
    lots = np.random.default_rng(seed).random((draws, *allowed.shape))
    chosen = np.where(allowed.cpu().numpy(), lots, -1.0).argmax(-1)
    return torch.from_numpy(chosen).to(tokens)
