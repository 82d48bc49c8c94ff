"""Has fine-tuning changed the mechanism? The plain questions, answered as far as the data can."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import ArgumentError, InputError
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.methods.ablations import pooled_ablation
from tl_entity.methods.circuits import Evaluation, evaluate
from tl_entity.methods.gate_training import GateTraining
from tl_entity.methods.gated_forward import NodesEvaluation
from tl_entity.methods.judgement import Judgement, Rules, judge
from tl_entity.methods.mechanism import find_mechanism
from tl_entity.methods.mechanism_result import Mechanism
from tl_entity.methods.node_effects import (
    AHEAD,
    LOG_PROBABILITY_AMONG,
    PROBABILITY_AMONG,
    answer_choices,
    node_effects,
)
from tl_entity.methods.pair_evidence import Alone, NodesCompared, PairEvidence, Share
from tl_entity.methods.pair_measures import (
    Worked,
    compare_edges,
    compare_information,
    compare_nodes,
    share_out_gain,
)
from tl_entity.metrics import LOG_PROBABILITY, PROBABILITY
from tl_entity.stats import Changes, paired_difference_interval
from tl_entity.tasks.batches import PairBatch, PromptBatch

QUICK = GateTraining(first_steps=20, steps=10, prompts_per_step=16, prunings=0)
"""A shorter search than `find_mechanism` makes by itself: it finds more nodes, which are as
faithful."""

PROMPTS_SCORED = 200
"""Prompts on which nodes are scored, at most."""

TARGET, AGREEMENT = 0.85, 0.8
"""What a mechanism must reach on the prompts that choose its size."""

ANOTHER, ELSE = "another of the choices", "anything else"
"""The kinds of wrong answers."""

Measured = TypeVar("Measured")


@checked
def judge_pair(
    base: Model,
    tuned: Model,
    prompts: PromptBatch,
    *,
    others: PromptBatch,
    information: Mapping[str, PairBatch] | None = None,
    training: GateTraining | None = QUICK,
    rules: Rules | None = None,
    seed: int = 0,
) -> Judgement:
    """Answer the plain questions about a base and its fine-tune, each with one number and its
    interval, or say why the data can't tell.

    Args:
        base: the model before.
        tuned: the model after.
        prompts: prompts with answers and blind roles.
        others: other prompts of the same form: what ablated nodes put out is from them, and each
            mechanism is tried on them in the other model.
        information: for each kind of information pairs of a prompt and a counterfactual, from
            `desideratum_pairs` with one seed; without them it is not asked what is carried.
        training: how mechanisms are searched for; None to leave it, and not to ask for them.
        rules: what the answers go by; `Rules()` if left out.
        seed: of the search, the twins of edges and the bootstrap.

    Raises:
        InputError: if the models differ in architecture or tokenizer, or the prompts have no roles
            or lack an answer.
        NotFiniteError: if weights or activations are NaN or infinite.
    """
    evidence = measure_pair(
        base, tuned, prompts, others=others, information=information, training=training, seed=seed
    )
    return judge(evidence, rules or Rules())


@checked
def measure_pair(
    base: Model,
    tuned: Model,
    prompts: PromptBatch,
    *,
    others: PromptBatch,
    information: Mapping[str, PairBatch] | None = None,
    training: GateTraining | None = QUICK,
    seed: int = 0,
) -> PairEvidence:
    """What `judge_pair` goes by, without the answers; arguments and errors are those of it."""
    check_same_architecture(base, tuned)
    if prompts.roles is None:
        raise InputError(
            "Nodes are by role, and the prompts have none; give PromptBatch its roles."
        )
    measuring = _Measuring(base, tuned, prompts, others, seed)
    worked = measuring.worked()
    nodes = measuring.attempt("nodes", lambda: compare_nodes(worked, seed=seed))
    edges = measuring.attempt("edges", lambda: measuring.edges(worked))
    carried = measuring.attempt("information", lambda: measuring.information(worked, information))
    alone = measuring.mechanisms(training)
    return measuring.evidence(nodes, edges, carried, alone)


class _Measuring:
    """One pair, and what could not be measured of it."""

    def __init__(
        self, base: Model, tuned: Model, prompts: PromptBatch, others: PromptBatch, seed: int
    ) -> None:
        self.models = (base, tuned)
        self.prompts, self.others, self.seed = prompts, others, seed
        self.choices = answer_choices(prompts)
        self.missing: dict[str, str] = {}
        self.ablations: list[Ablation] = [pooled_ablation(m, others) for m in self.models]
        self.metric = LOG_PROBABILITY if self.choices is None else LOG_PROBABILITY_AMONG
        ahead = None if self.choices is None else AHEAD
        self.answers: list[Evaluation] = [evaluate(m, prompts, metric=ahead) for m in self.models]

    def attempt(self, name: str, measure: Callable[[], Measured]) -> Measured | None:
        """What is measured; None, with the reason kept, if it can't be."""
        try:
            return measure()
        except ArgumentError:
            raise
        except InputError as error:
            self.missing[name] = str(error)
            return None

    def worked(self) -> Worked:
        """What each node does in either model."""
        base, tuned = (
            node_effects(model, self.prompts[:PROMPTS_SCORED], ablation, metric=self.metric)
            for model, ablation in zip(self.models, self.ablations, strict=True)
        )
        return Worked((base, tuned), self.prompts.role_names)

    def edges(self, worked: Worked) -> Changes:
        metric = PROBABILITY if self.choices is None else PROBABILITY_AMONG
        nodes = tuple(dict.fromkeys([*worked.nodes_of(0), *worked.nodes_of(1)]))
        return compare_edges(self.models, self.prompts, nodes, metric=metric, seed=self.seed)

    def information(self, worked: Worked, pairs: Mapping[str, PairBatch] | None) -> Changes:
        if not pairs:
            raise InputError("No pairs were given that tell kinds of information apart.")
        return compare_information(self.models, worked, pairs, seed=self.seed)

    def mechanisms(self, training: GateTraining | None) -> dict[str, Alone]:
        """Each model's mechanism in its own model and in the other."""
        if training is None:
            reason = "No mechanism was searched for."
            self.missing |= {f"{name} mechanism": reason for name in ("base", "tuned")}
            return {}
        found: list[Mechanism | None] = []
        alone: dict[str, Alone] = {}
        names = ("base", "tuned")
        for name, model, ablation in zip(names, self.models, self.ablations, strict=True):
            mechanism = self.attempt(
                f"{name} mechanism",
                lambda model=model, ablation=ablation: find_mechanism(
                    model,
                    self.prompts,
                    ablation=ablation,
                    target=TARGET,
                    agreement=AGREEMENT,
                    training=training,
                    curve=(),
                    n_random=0,
                    seed=self.seed,
                ),
            )
            found.append(mechanism)
            if mechanism is not None:
                alone[f"{name}_alone"] = _alone(mechanism.found, mechanism)
        for (name, mechanism), i in zip(zip(names, found, strict=True), (1, 0), strict=True):
            if mechanism is not None:
                answers = mechanism.evaluate(
                    self.models[i], self.others, ablation=self.ablations[i]
                )
                alone[f"{name}_in_{names[i]}"] = _alone(answers, mechanism)
        return alone

    def evidence(
        self,
        nodes: NodesCompared | None,
        edges: Changes | None,
        information: Changes | None,
        alone: Mapping[str, Alone],
    ) -> PairEvidence:
        right = [found.correct for found in self.answers]
        ability = None
        if self.choices is not None:
            ability = _share(*self._among())
        else:
            self.missing["ability"] = (
                "it is not known among which tokens of a prompt its answer has to be found"
            )
        before, after = (found.answer_log_probability for found in self.answers)
        gain = self.attempt(
            "gain", lambda: share_out_gain(*self.models, self.prompts, after - before)
        )
        return PairEvidence(
            n=len(self.prompts),
            better=_share(*right),
            ability=ability,
            errors=self._errors(),
            base_alone=alone.get("base_alone"),
            tuned_alone=alone.get("tuned_alone"),
            base_in_tuned=alone.get("base_in_tuned"),
            tuned_in_base=alone.get("tuned_in_base"),
            nodes=nodes,
            edges=edges,
            information=information,
            gain=gain,
            missing=self.missing,
        )

    def _among(self) -> list[Tensor]:
        """Whether the answer is ahead of the other choices."""
        return [found.values > 0 for found in self.answers if found.values is not None]

    def _errors(self) -> dict[str, Share]:
        if self.choices is None:
            return {}
        wrong = [~found.correct for found in self.answers]
        among = [(found.predicted[:, None] == self.choices).any(1) for found in self.answers]
        return {
            ANOTHER: _share(*(w & a for w, a in zip(wrong, among, strict=True))),
            ELSE: _share(*(w & ~a for w, a in zip(wrong, among, strict=True))),
        }


def _share(base: Tensor, tuned: Tensor) -> Share:
    one, other = (x.cpu().numpy().astype(bool) for x in (base, tuned))
    return Share(
        float(one.mean()),
        float(other.mean()),
        float(other.mean() - one.mean()),
        paired_difference_interval(other, one),
    )


def _alone(found: NodesEvaluation, mechanism: Mechanism) -> Alone:
    ratio = found.faithfulness
    return Alone(
        n_nodes=found.n_nodes,
        n_all=mechanism.n_all,
        faithfulness=ratio.value,
        faithfulness_interval=ratio.interval,
        agreement=found.agreement,
        agreement_interval=found.agreement_interval,
        nodes=mechanism.nodes,
    )
