"""What each part of the model writes towards the answer: direct logit attribution and the logit
lens (nostalgebraist 2020; Elhage et al. 2021).

The final residual stream is the sum of what embedding, heads and MLPs write. With the final norm's
scale as it is on each prompt, the logits are linear in that sum, so each part has a share of the
answer's logit, and all shares sum to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.hooks.vocabulary import check_metric
from tl_entity.methods.gains import scored_pairs
from tl_entity.metrics import LOG_PROBABILITY, LOGIT_DIFFERENCE, TARGET_LOGIT, Metric, check_values
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.runs.runner import BATCH_SIZE, Runner, RunSettings
from tl_entity.stats import mean_intervals
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

EMBEDDING, BIASES = "embedding", "biases"
"""Names of the parts that are of no layer. Biases are those of attention outputs, of the final norm
and of the unembedding; an MLP's are counted with it."""

FINAL_SCALE = "ln_final.hook_scale"
"""What the final norm divides by."""


@checked
@dataclass(frozen=True)
class LogitAttribution(Result):
    """What each part of the model adds to the answer's logit, or to the logit difference.

    Attributes:
        heads: of each head, one value a prompt.
        mlps: of each layer's MLP; none of a model without MLPs.
        embedding: of the token's embedding.
        biases: of the biases of attention outputs, final norm and unembedding.
        metric: what they sum to.
    """

    heads: Float[Tensor, "layer head batch"]
    mlps: Float[Tensor, "mlp batch"]
    embedding: Float[Tensor, " batch"]
    biases: Float[Tensor, " batch"]
    metric: str

    def __str__(self) -> str:
        rows = self.table(3)
        most = ", ".join(
            f"{part} {score:+.3f}" for part, score in zip(rows["part"], rows["score"], strict=True)
        )
        total = float(self.total.mean())
        return f"{self.metric} {total:+.3f} of {len(self.total)} prompts; most from {most}"

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The metric itself: the sum of all parts."""
        return self.per_example.sum(0)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts: the embedding, the heads, the MLPs, the biases."""
        n_layers, n_heads, _ = self.heads.shape
        heads = [str(Head(*index)) for index in np.ndindex(n_layers, n_heads)]
        mlps = [f"MLP {layer}" for layer in range(len(self.mlps))]
        return (EMBEDDING, *heads, *mlps, BIASES)

    @property
    def per_example(self) -> Float[Tensor, "part batch"]:
        """All parts, in the order of `parts`."""
        return torch.cat(
            [self.embedding[None], self.heads.flatten(0, 1), self.mlps, self.biases[None]]
        )

    @property
    def by_layer(self) -> Float[Tensor, "layer batch"]:
        """What a layer's heads and its MLP add together."""
        heads = self.heads.sum(1)
        return heads + self.mlps if len(self.mlps) else heads

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a part: its mean and the 95 % interval of that."""
        import pandas as pd

        bounds = _intervals(self.per_example)
        scores = self.per_example.mean(-1).tolist()
        return pd.DataFrame(
            {"part": self.parts, "score": scores, "low": bounds[:, 0], "high": bounds[:, 1]}
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` parts that add or take away the most; None for all."""
        rows = self.to_dataframe()
        order = rows["score"].abs().sort_values(ascending=False, kind="stable").index
        rows = rows.loc[order].reset_index(drop=True)
        return rows if n is None else rows.head(n)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Bars, with 95 % intervals: heads and MLP of each layer, embedding and biases."""
        from tl_entity.plots.bars import Bar, grouped_bars

        def bars(values: Tensor, names: Sequence[str]) -> dict[str, Bar]:
            numbers = zip(names, values.mean(-1).tolist(), _intervals(values).tolist(), strict=True)
            return {name: Bar(score, *bounds) for name, score, bounds in numbers}

        layers = [str(layer) for layer in range(len(self.heads))]
        ends = torch.stack([self.embedding, self.biases])
        series = {
            "heads": bars(self.heads.sum(1), layers),
            "MLP": bars(self.mlps, layers[: len(self.mlps)]),
            "other": bars(ends, [EMBEDDING, BIASES]),
        }
        title = f"What adds to the {self.metric}" if title is None else title
        figure = grouped_bars(series, title=title, axis=self.metric)
        figure.update_xaxes(title_text="layer", type="category")
        return figure.update_yaxes(autorange=True, range=None, tickformat=None, dtick=None)


@checked
@dataclass(frozen=True)
class LogitLens(Result):
    """What the model would answer if it ended ahead of a layer.

    Attributes:
        per_example: the metric, one value a layer and prompt; the last entry is the model's own.
        metric: its name.
    """

    per_example: Float[Tensor, "layer batch"]
    metric: str

    def __str__(self) -> str:
        first, last = self.scores[0].item(), self.scores[-1].item()
        n_layers, n_prompts = self.per_example.shape
        return (
            f"{self.metric} {first:+.3f} ahead of layer 0, {last:+.3f} behind layer "
            f"{n_layers - 2}, of {n_prompts} prompts"
        )

    @property
    def scores(self) -> Float[Tensor, " layer"]:
        """Mean over the prompts."""
        return self.per_example.mean(-1)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer: the mean ahead of it and the 95 % interval of that; the last row is of
        the whole model."""
        import pandas as pd

        bounds = _intervals(self.per_example)
        return pd.DataFrame(
            {
                "layer": range(len(self.scores)),
                "score": self.scores.tolist(),
                "low": bounds[:, 0],
                "high": bounds[:, 1],
            }
        )

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Bars, one ahead of each layer and one behind the last, with 95 % intervals."""
        from tl_entity.plots.bars import Bar, grouped_bars

        numbers = zip(self.scores.tolist(), _intervals(self.per_example).tolist(), strict=True)
        bars = {str(layer): Bar(score, *of) for layer, (score, of) in enumerate(numbers)}
        title = "Logit lens: the model cut off ahead of a layer" if title is None else title
        figure = grouped_bars({self.metric: bars}, title=title, axis=self.metric)
        figure.update_xaxes(title_text="layer", type="category")
        return figure.update_yaxes(autorange=True, range=None, tickformat=None, dtick=None)


@checked
@torch.no_grad()
def logit_attribution(
    model: Model,
    prompts: PromptBatch | PairBatch,
    *,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> LogitAttribution:
    """What each head and MLP, the embedding and the biases add to the answer's logit at `"last"`,
    or to the difference between the logits of answer and foil.

    The final norm is the one that each prompt has in the whole run: its scale, and its weight,
    which need not be folded into the unembedding. So the parts sum to the metric.

    Args:
        model: the model; any kind, run once by plain hooks.
        prompts: prompts, whose answers are scored; of pairs, the clean prompts are run and their
            targets scored, and their foils if they have them.
        metric: `LOGIT_DIFFERENCE` or `TARGET_LOGIT`, or another that is a sum of a few tokens'
            logits; the first if there are foils and the second if not, where it is left out.
        how: batch_size, memory, ranks or runner: see `Runner`.

    Raises:
        InputError: if the metric is no sum of logits or lacks what it needs, the parts of the model
            do not sum to its logits, a prompt has no answer, or the model does not know a token or
            has hooks attached to it.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    pairs = scored_pairs(model, prompts)
    if metric is None:
        metric = TARGET_LOGIT if pairs.foils is None else LOGIT_DIFFERENCE
    if metric.tokens is None or metric.log_probabilities:
        raise _not_linear(metric)
    check_metric(model, metric, pairs)
    cfg, chosen = model.cfg, metric

    def compute(chunk: PairBatch) -> tuple[Tensor, ...]:
        written = _Written.record(model, chunk.clean)
        logits = written.logits(model, chosen, chunk)
        values = chosen.value(logits, chunk)
        whole = chosen.value(logits.sum(0), chunk)
        if not torch.allclose(values.sum(0), whole, rtol=1e-3, atol=1e-3 * _size(values)):
            raise _not_linear(chosen)
        return (values,)

    runner = Runner.of(**how)
    (values,) = runner.over(pairs, runner.batch_size or BATCH_SIZE, compute, model)
    check_values(metric, values, " by part of the model")
    n_heads = cfg.n_layers * cfg.n_heads
    embedding, heads, mlps, biases = values.split([1, n_heads, len(values) - n_heads - 2, 1])
    heads = heads.unflatten(0, (cfg.n_layers, cfg.n_heads))
    return LogitAttribution(heads, mlps, embedding[0], biases[0], metric.name)


@checked
@torch.no_grad()
def logit_lens(
    model: Model,
    prompts: PromptBatch | PairBatch,
    *,
    metric: Metric = LOG_PROBABILITY,
    **how: Unpack[RunSettings],
) -> LogitLens:
    """What the model would answer at `"last"` if it ended ahead of each layer: the residual stream
    there, through the model's own final norm and unembedding.

    Args:
        model: the model; any kind, run once by plain hooks.
        prompts: as in `logit_attribution`.
        metric: what is read off the logits; any.
        how: batch_size, memory, ranks or runner: see `Runner`.

    Raises:
        InputError: if the metric lacks what it needs, a prompt has no answer, or the model does not
            know a token or has hooks attached to it.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    pairs = scored_pairs(model, prompts)
    check_metric(model, metric, pairs)
    last = model.cfg.n_layers - 1
    streams = [hook_point("resid_pre", layer) for layer in range(last + 1)]
    streams.append(hook_point("resid_post", last))

    def compute(chunk: PairBatch) -> tuple[Tensor, ...]:
        seen = record(model, chunk.clean, dict.fromkeys(streams, ANSWER_POSITION))
        place = model.unembed.W_U.device
        logits = (model.unembed(model.ln_final(seen[at][:, None].to(place))) for at in streams)
        return (torch.stack([metric.of_logits(some[:, 0], chunk) for some in logits]),)

    runner = Runner.of(**how)
    (values,) = runner.over(pairs, runner.batch_size or BATCH_SIZE, compute, model)
    check_values(metric, values, " by layer")
    return LogitLens(values, metric.name)


class _Written(NamedTuple):
    """What is written into the residual stream of the answer's token, and how it is read.

    Attributes:
        parts: what embedding, heads, MLPs and attention's biases write; they sum to the stream.
        stream: the final residual stream.
        scale: what the final norm divides it by.
    """

    parts: Float[Tensor, "part batch d_model"]
    stream: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, "batch 1"]

    @classmethod
    def record(cls, model: Model, prompts: PromptBatch) -> "_Written":
        layers = range(model.cfg.n_layers)
        z = [hook_point("z", layer) for layer in layers]
        mlps = [] if model.cfg.attn_only else [hook_point("mlp_out", layer) for layer in layers]
        ends = (hook_point("resid_pre", 0), hook_point("resid_post", layers[-1]), FINAL_SCALE)
        seen = record(model, prompts, dict.fromkeys((*z, *mlps, *ends), ANSWER_POSITION))
        # Where the unembedding is: a model's layers can be spread over several devices.
        here = {name: _wide(some).to(model.unembed.W_U.device) for name, some in seen.items()}
        embedding, stream, scale = (here[name] for name in ends)
        parts, bias = [embedding], torch.zeros_like(stream)
        for layer, name in enumerate(z):
            attention = model.blocks[layer].attn
            w_o = _wide(attention.W_O).to(stream.device)
            parts += torch.einsum("bhe,hed->hbd", here[name], w_o).unbind()
            if getattr(attention, "b_O", None) is not None:
                bias = bias + _wide(attention.b_O).to(stream.device)
        return cls(torch.stack([*parts, *(here[name] for name in mlps), bias]), stream, scale)

    def logits(
        self, model: Model, metric: Metric, pairs: PairBatch
    ) -> Float[Tensor, "part batch wanted"]:
        """What each part adds to the logits of the tokens that a metric reads.

        Raises:
            InputError: if that is not all that the model's logits are made of.
        """
        assert metric.tokens is not None
        norm: Any = model.ln_final
        unembed = model.unembed
        wanted = metric.tokens(pairs).to(self.stream.device)
        columns = _wide(unembed.W_U).T[wanted]  # [batch wanted d_model]
        parts = self.parts
        if getattr(model.cfg, "normalization_type", None) in ("LN", "LNPre"):
            parts = parts - parts.mean(-1, keepdim=True)
        weight = getattr(norm, "w", None)
        read = columns if weight is None else columns * _wide(weight)
        logits = torch.einsum("pbd,bwd->pbw", parts / self.scale, read)
        if getattr(norm, "b", None) is not None:
            logits[-1] += columns @ _wide(norm.b)
        if getattr(unembed, "b_U", None) is not None:
            logits[-1] += _wide(unembed.b_U)[wanted]
        whole = unembed(norm(self.stream[:, None].to(unembed.W_U.dtype)))[:, 0].gather(-1, wanted)
        off = (logits.sum(0) - whole).abs().max()
        if off > _tolerance(model) * _size(logits):
            raise InputError(
                f"What the model's heads and MLPs write does not sum to its logits (off by "
                f"{float(off):.3g}): it normalises what they write, or caps its logits, so direct "
                "attribution does not fit it."
            )
        return logits


def _tolerance(model: Model) -> float:
    """What rounding may come to, as a share of the largest sum of a prompt's parts."""
    return max(1e-4, 8 * torch.finfo(model.cfg.dtype).eps)


def _size(values: Float[Tensor, "part *batch"]) -> float:
    return float(values.abs().sum(0).max())


def _wide(numbers: Tensor) -> Tensor:
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _intervals(values: Float[Tensor, "part batch"]) -> Float64[np.ndarray, "part 2"]:
    return mean_intervals(values.double().cpu().numpy())


def _not_linear(metric: Metric) -> InputError:
    return InputError(
        f"The metric {metric.name!r} is not a sum of a few tokens' logits, so no part of the model "
        "has a share of it; use TARGET_LOGIT or LOGIT_DIFFERENCE."
    )
