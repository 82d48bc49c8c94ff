"""Ranks and their correlation."""

import numpy as np
from jaxtyping import Float, Float64

from tl_entity._typing import checked


@checked
def average_ranks(values: Float[np.ndarray, "*cells n"]) -> Float64[np.ndarray, "*cells n"]:
    """Ranks from 1 along the last axis; equal values share the mean of their ranks."""
    order = values.argsort(-1, kind="stable")
    ascending = np.take_along_axis(values, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    begins = np.ones(values.shape, dtype=bool)
    begins[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    ends = np.ones(values.shape, dtype=bool)
    ends[..., :-1] = begins[..., 1:]
    first = np.maximum.accumulate(np.where(begins, place, 0), -1)
    last = np.where(ends, place, values.shape[-1])
    last = np.flip(np.minimum.accumulate(np.flip(last, -1), -1), -1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    return ranks


@checked
def spearman(
    one: Float[np.ndarray, "*cells n"], other: Float[np.ndarray, "*cells n"]
) -> Float64[np.ndarray, "*cells"]:
    """Spearman's rank correlation along the last axis, for every cell at once: the correlation of
    average ranks. NaN where one of the two is constant or has a single value."""
    if one.shape[-1] == 0:
        return np.full(one.shape[:-1], np.nan)
    ranks = [average_ranks(values) for values in (one, other)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    spread = [np.sqrt((values**2).sum(-1)) for values in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(-1) / (spread[0] * spread[1]))
