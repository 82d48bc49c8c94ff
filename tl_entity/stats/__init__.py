"""Intervals, chance levels and rank correlations: every number carries its uncertainty."""

from tl_entity.stats.chance import (
    Chance,
    layered_overlap_by_chance,
    overlap_by_chance,
    overlap_of_choices,
    shared_by_all,
)
from tl_entity.stats.changes import (
    Changes,
    GroupChange,
    adjusted_p_values,
    compare_effects,
    each_alike,
    kept_by_chance,
    share_changes,
)
from tl_entity.stats.intervals import (
    NO_INTERVAL,
    Z_95,
    Interval,
    mean_intervals,
    paired_difference_interval,
    paired_loss_interval,
    wilson_interval,
)
from tl_entity.stats.ranks import average_ranks, spearman
from tl_entity.stats.ratios import (
    paired_counts,
    paired_ratio_interval,
    paired_ratio_intervals,
)
from tl_entity.stats.shares import paired_share, paired_share_interval, share_scores

__all__ = [
    "NO_INTERVAL",
    "Z_95",
    "Chance",
    "Changes",
    "GroupChange",
    "Interval",
    "adjusted_p_values",
    "average_ranks",
    "compare_effects",
    "each_alike",
    "kept_by_chance",
    "layered_overlap_by_chance",
    "mean_intervals",
    "overlap_by_chance",
    "overlap_of_choices",
    "paired_counts",
    "paired_difference_interval",
    "paired_loss_interval",
    "paired_ratio_interval",
    "paired_ratio_intervals",
    "paired_share",
    "paired_share_interval",
    "share_changes",
    "share_scores",
    "shared_by_all",
    "spearman",
    "wilson_interval",
]
