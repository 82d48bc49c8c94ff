"""What sets a model apart from the plain one that methods compute with: each obstacle once, with
its reason, for whoever must refuse it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tl_entity.errors import InputError

OLMO = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM")
"""Architectures that normalise after attention and MLP, and the queries and keys of all heads
together."""


class Obstacle(NamedTuple):
    """Something that a computation may not allow for.

    Attributes:
        reason: what is so of the model: the end of a sentence.
        applies: whether it is so, from TransformerLens's configuration.
    """

    reason: str
    applies: Callable[[Any], bool]


def _flag(name: str) -> Callable[[Any], bool]:
    return lambda cfg: bool(getattr(cfg, name, False))


def _is_grouped(cfg: Any) -> bool:
    return (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) != cfg.n_heads


OBSTACLES: dict[str, Obstacle] = {
    "positions": Obstacle(
        "its positions are not rotary", lambda cfg: cfg.positional_embedding_type != "rotary"
    ),
    "parallel": Obstacle("attention and MLP run in parallel", _flag("parallel_attn_mlp")),
    "no MLPs": Obstacle("it has no MLPs", _flag("attn_only")),
    "norm after": Obstacle(
        "it normalises after attention or MLP",
        lambda cfg: (
            bool(cfg.use_normalization_before_and_after) or cfg.original_architecture in OLMO
        ),
    ),
    "norm of all heads": Obstacle(
        "it normalises the queries and keys of all heads together",
        lambda cfg: cfg.original_architecture in OLMO,
    ),
    "scaled queries": Obstacle("it rescales queries with length", _flag("use_logn_attn")),
    "shared heads apart": Obstacle(
        "its key and value heads are set apart (ungroup_grouped_query_attention)",
        lambda cfg: bool(cfg.ungroup_grouped_query_attention) and _is_grouped(cfg),
    ),
    "heads apart": Obstacle(
        "its key and value heads are set apart (ungroup_grouped_query_attention)",
        _flag("ungroup_grouped_query_attention"),
    ),
    "inputs apart": Obstacle(
        "the inputs of its heads are set apart (use_attn_in, use_split_qkv_input)",
        lambda cfg: bool(cfg.use_attn_in or cfg.use_split_qkv_input),
    ),
    "not causal": Obstacle(
        "its attention is not causal", lambda cfg: cfg.attention_dir != "causal"
    ),
    "capped scores": Obstacle(
        "its attention scores are capped", lambda cfg: cfg.attn_scores_soft_cap > 0
    ),
    "capped logits": Obstacle("its logits are capped", lambda cfg: cfg.output_logits_soft_cap > 0),
    "sinks": Obstacle("it has attention sinks", _flag("use_attention_sinks")),
    "dynamic rotary": Obstacle(
        "its rotary table changes with length", _flag("use_dynamic_ntk_rope")
    ),
    "clipped": Obstacle(
        "it clips queries, keys and values",
        lambda cfg: getattr(cfg, "clip_qkv", None) is not None,
    ),
    "quantised": Obstacle("it is quantised", _flag("load_in_4bit")),
}
"""By name."""


def refuse(cfg: Any, names: Sequence[str], sentence: str) -> None:
    """Make sure that none of these obstacles is in a model.

    Args:
        cfg: TransformerLens's configuration of the model.
        names: of the obstacles, in the order they are looked for.
        sentence: what to say, with `{reason}` in it.

    Raises:
        InputError: with the reason of the first that applies.
    """
    for name in names:
        reason, applies = OBSTACLES[name]
        if applies(cfg):
            raise InputError(sentence.format(reason=reason))
