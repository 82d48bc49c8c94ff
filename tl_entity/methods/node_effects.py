"""How much each node does for the answer of each prompt, and among which tokens the answer is."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._model import Model, check_takes_gradients, frozen
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.finite import check_finite
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.gates import GateHeads
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.ablations import BATCH_SIZE
from tl_entity.methods.gains import scored_pairs
from tl_entity.methods.gate_training import SCORED_AT
from tl_entity.methods.masked_forward import outside_inference
from tl_entity.metrics import LOG_PROBABILITY, Metric
from tl_entity.tasks.batches import PairBatch, PromptBatch


@checked
def answer_choices(prompts: PromptBatch) -> Int[Tensor, "batch choice"] | None:
    """The tokens among which a prompt's answer has to be found: those of its role, the answer
    first.

    Returns:
        None if prompts have no roles, or the answers are at no common role, or prompts have
        unequally many tokens there.
    """
    if prompts.roles is None:
        return None
    answers = prompts.answers[:, None]
    at = (prompts.tokens == answers) & prompts.mask
    if not bool(at.any(1).all()):
        return None
    for role in range(len(prompts.role_names)):
        there = prompts.roles == role
        if not bool((at & there).any(1).all()):
            continue
        rows = [
            [int(answer), *dict.fromkeys(t for t in row[mask].tolist() if t != answer)]
            for row, mask, answer in zip(
                prompts.tokens, there, prompts.answers.tolist(), strict=True
            )
        ]
        if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            return torch.tensor(rows, device=prompts.tokens.device)
    return None


def _choices_of_pairs(pairs: PairBatch) -> Tensor:
    choices = answer_choices(pairs.clean)
    if choices is None:
        raise InputError(
            "The answer's probability among its choices needs prompts in which it stands at one "
            "role, beside equally many others; take the log probability."
        )
    return choices


def _log_share(logits: Tensor, pairs: PairBatch) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide[..., 0] - wide.logsumexp(-1)


def _share(logits: Tensor, pairs: PairBatch) -> Tensor:
    return _log_share(logits, pairs).exp()


def _ahead(logits: Tensor, pairs: PairBatch) -> Tensor:
    return logits[..., 0] - logits[..., 1:].amax(-1)


AHEAD = Metric("logit ahead of the other choices", _ahead, tokens=_choices_of_pairs)
"""The answer's logit minus that of the most likely other token of its role: above zero, the answer
would be named if one of them had to be."""

LOG_PROBABILITY_AMONG = Metric(
    "log probability among the choices", _log_share, tokens=_choices_of_pairs
)
"""The answer's log probability if one of the tokens of its role had to be named. It does not ask
whether the model names any of them."""

PROBABILITY_AMONG = Metric("probability among the choices", _share, tokens=_choices_of_pairs)
"""The same as a probability, which no single prompt can decide."""


@checked
@torch.inference_mode(False)
@torch.enable_grad()
def node_effects(
    model: Model,
    prompts: PromptBatch | PairBatch,
    ablation: Ablation,
    *,
    metric: Metric = LOG_PROBABILITY,
    batch_size: int = BATCH_SIZE,
) -> Float[Tensor, "batch layer role head"]:
    """For each prompt the gradient of the metric with respect to every node's gate, in the mean
    over all gates at .25, .5, .75 and 1.

    It is the node's score (`find_mechanism`) prompt by prompt. With gates between nothing and the
    whole model, heads that stand in for each other share what they do, where removing one of them
    from the whole model would show nothing.

    Args:
        model: the model.
        prompts: prompts with roles and answers.
        ablation: what a node puts out at 0.
        metric: what is scored.
        batch_size: prompts run together.

    Raises:
        InputError: if the prompts have no roles or lack an answer, the ablation does not fit them
            or the model, or no gradient can be taken.
        NotFiniteError: if a score is not finite.
    """
    check_takes_gradients(model)
    ablation = ablation.of_model(model.cfg)
    pairs = outside_inference(scored_pairs(model, prompts))
    if pairs.clean.roles is None:
        raise InputError("A node is a head at the tokens of a role, and the prompts have no roles.")
    with guarded(model), frozen(model):
        parts = [_of_batch(model, some, ablation, metric) for some in pairs.chunks(batch_size)]
    effects = torch.cat(parts)
    check_finite("The nodes' scores [prompt, layer, role, head]", effects, "look at the answers")
    return effects


def _of_batch(model: Model, pairs: PairBatch, ablation: Ablation, metric: Metric) -> Tensor:
    assert ablation.outputs is not None and pairs.clean.roles is not None
    rows = ablation.rows(pairs.clean)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    roles = torch.arange(len(pairs.clean.role_names), device=rows.device)
    of_role = (pairs.clean.roles[..., None] == roles).to(torch.float32)
    total = torch.zeros(len(pairs), n_layers, len(roles), n_heads)
    for value in SCORED_AT:
        gates = [
            torch.full((*rows.shape, n_heads), value, requires_grad=True) for _ in range(n_layers)
        ]
        hooks = [
            (hook_point("z", layer), GateHeads(gates[layer], rows, ablation.outputs[layer]))
            for layer in range(n_layers)
        ]
        logits = answer_logits(model, pairs.clean, hooks)
        found = torch.autograd.grad(metric.of_logits(logits, pairs).sum(), gates)
        for layer, gradient in enumerate(found):
            total[:, layer] += torch.einsum("bph,bpr->brh", gradient, of_role) / len(SCORED_AT)
    return total
