"""How a model answers with some of its nodes left: accuracy, agreement and divergence."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.methods.circuits import Evaluation, Faithfulness
from tl_entity.results import Result
from tl_entity.stats import Interval, mean_intervals, wilson_interval

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True)
class NodesEvaluation(Result):
    """How a model answers prompts with some nodes left and all others ablated.

    Attributes:
        n_nodes: how many are left.
        alone: the answers.
        whole: those of the whole model.
        kl: Kullback-Leibler divergence of the answers' distribution from the whole model's, in
            nats.
        metric: name of the metric.
        value: its value for each prompt.
        whole_value: that of the whole model.
        seed: of the bootstrap.
    """

    n_nodes: int
    alone: Evaluation
    whole: Evaluation
    kl: Float[Tensor, " batch"]
    metric: str
    value: Float[Tensor, " batch"]
    whole_value: Float[Tensor, " batch"]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.alone)

    def __str__(self) -> str:
        return (
            f"{self.n_nodes} nodes: accuracy {self.alone.accuracy:.3f} of the model's "
            f"{self.whole.accuracy:.3f}, faithfulness {self.faithfulness.value:.3f} "
            f"{self.faithfulness.interval}, agreement {self.agreement:.3f} "
            f"{self.agreement_interval}, KL {self.mean_kl:.4f} {self.kl_interval}; "
            f"{len(self)} prompts"
        )

    @property
    def faithfulness(self) -> Faithfulness:
        """Accuracy over the whole model's. Above 1, the ablation also took away what hinders."""
        return Faithfulness.of(self.alone, self.whole, seed=self.seed)

    @property
    def agreement(self) -> float:
        """Share of prompts answered with the token that the whole model answers, right or not."""
        return self._n_agreeing / len(self)

    @property
    def agreement_interval(self) -> Interval:
        """Wilson's 95 % interval of that share."""
        return wilson_interval(self._n_agreeing, len(self))

    @property
    def mean_kl(self) -> float:
        """Mean divergence from the whole model's distribution, in nats."""
        return float(self.kl.double().mean())

    @property
    def kl_interval(self) -> Interval:
        """Normal 95 % interval of that mean; no divergence is below zero."""
        low, high = mean_intervals(self.kl.double().cpu().numpy())
        return Interval(max(0.0, float(low)), float(high))

    @property
    def _n_agreeing(self) -> int:
        return int((self.alone.predicted == self.whole.predicted).sum())

    def of_whole(self, n_nodes: int) -> "NodesEvaluation":
        """The same of the whole model, which has so many nodes."""
        return replace(
            self,
            n_nodes=n_nodes,
            alone=self.whole,
            kl=torch.zeros_like(self.kl),
            value=self.whole_value,
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each thing measured, with its interval."""
        import pandas as pd

        measured = {
            **self.measured,
            "accuracy of the whole model": (self.whole.accuracy, self.whole.interval),
        }
        return pd.DataFrame(
            [
                {"of": name, "value": value, "low": low, "high": high}
                for name, (value, (low, high)) in measured.items()
            ]
        )

    @property
    def measured(self) -> dict[str, tuple[float, Interval]]:
        """Accuracy, faithfulness, agreement and KL, each with its 95 % interval."""
        ratio = self.faithfulness
        return {
            "accuracy": (self.alone.accuracy, self.alone.interval),
            "faithfulness": (ratio.value, ratio.interval),
            "agreement": (self.agreement, self.agreement_interval),
            "KL": (self.mean_kl, self.kl_interval),
        }
