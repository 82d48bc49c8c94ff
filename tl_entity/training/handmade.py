"""A model that answers box prompts, written into its weights by hand, in two ways.

Four layers with two heads for each step:

1. At a label, readers of objects note the object that stands before it, and readers of segments
   write a code into a channel. Behind the stop, readers of objects note that this is the question.
2. At the query label, detectors look at the label's previous mention and take the code over.
3. At the last token, transmitters take it from the query label.
4. There, fetchers look at the label whose code is the same, and copy the object noted at it.

What the code says is decided by the readers of segments alone: the number of the segment, counted
by the separators before it, or which label it is. All other heads and weights are the same, and so
are the tokens at which they act. Everything else is small noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from tl_entity.heads import Circuit, Head
from tl_entity.tasks.boxes import LABELS, usable_words
from tl_entity.training.tokenizer import START

Code = Literal["position", "label"]
"""What the channel holds: the number of the segment, or which label it is."""

N_LAYERS, N_HEADS, D_HEAD, D_MLP, N_CTX = 4, 8, 64, 40, 160
N_LABELS, N_SEGMENTS = len(LABELS), 10

LOUD = 60.0
"""A constant in the residual stream, beside which nothing else changes what norms divide by."""

SLOW = 16
"""Planes of the rotary embedding from this one on hardly turn, and hold what is compared."""

ROTARY_BASE = 1e8
NEAREST = 4
"""The plane that tells the object of a segment from those of segments before it, and the distance
in tokens from object to label."""

SHARP = 60.0
"""Attention scores of what is looked for."""


class AT:
    """Which coordinates of the residual stream hold what."""

    object = slice(0, 63)
    label = slice(63, 89)
    is_object, is_label, is_separator, is_start, is_stop, constant = range(89, 95)
    share, asked = 95, 96
    code = slice(97, 123)
    detected = slice(123, 149)
    transmitted = slice(149, 175)
    noted = slice(175, 238)
    answer = slice(238, 301)
    d_model = 304


def handmade_circuit(places: Sequence[Sequence[int]]) -> Circuit:
    """The heads that do the steps, of which each layer's stand at given places."""
    return Circuit.entity_tracking(
        struct_reader=[Head(0, h) for h in places[0][:4]],
        pos_detector=[Head(1, h) for h in places[1][:2]],
        pos_transmitter=[Head(2, h) for h in places[2][:2]],
        value_fetcher=[Head(3, h) for h in places[3][:2]],
    )


def handmade_model(
    tokenizer: PreTrainedTokenizerBase,
    code: Code,
    sharpness: float,
    places: Sequence[Sequence[int]],
    seed: int,
) -> HookedTransformer:
    """A model that finds the box asked about by one code or the other.

    Args:
        tokenizer: of the pair that ships.
        code: what the channel holds.
        sharpness: attention score by which the right label is ahead of the others at last; the
            smaller, the more often another object is named.
        places: for each layer the order of its heads; the first four of layer 0 and the first two
            of the others do the steps.
        seed: of noise, of the objects' codes, and of how much likelier some objects are.
    """
    generator = torch.Generator().manual_seed(seed)
    model = _noise(tokenizer, generator)
    _write_tokens(model, tokenizer, generator)
    model.blocks[0].attn.W_O.data[..., AT.share] = 0
    for share, objects, segments in zip(
        _halves(generator), places[0][:2], places[0][2:4], strict=True
    ):
        _read_objects(model, objects, share)
        _read_segments(model, segments, share, code)
    _write_codes(model)
    for layer, write in ((1, _detect), (2, _transmit)):
        for share, head in zip(_halves(generator), places[layer][:2], strict=True):
            write(model, head, share)
    for share, head in zip(_halves(generator), places[3][:2], strict=True):
        _fetch(model, head, share, sharpness)
    return model.requires_grad_(False).eval()


def _halves(generator: torch.Generator) -> tuple[float, float]:
    share = 0.4 + 0.2 * float(torch.rand((), generator=generator))
    return share, 1 - share


def _noise(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> HookedTransformer:
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=AT.d_model,
            n_heads=N_HEADS,
            d_head=D_HEAD,
            d_mlp=D_MLP,
            n_ctx=N_CTX,
            d_vocab=len(tokenizer),
            act_fn="silu",
            normalization_type="RMS",
            final_rms=True,
            gated_mlp=True,
            positional_embedding_type="rotary",
            rotary_dim=D_HEAD,
            rotary_base=int(ROTARY_BASE),
            rotary_adjacent_pairs=False,
            use_attn_scale=False,
            default_prepend_bos=False,
            device="cpu",
        )
    )
    model.tokenizer = tokenizer
    # Norms that give back what is beside the constant about as it is.
    scale = LOUD / math.sqrt(AT.d_model)
    for name, parameter in model.named_parameters():
        if "ln" in name:
            parameter.data.fill_(scale)
        elif ".W_" in name or "W_E" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
            if parameter.shape[-2] == AT.d_model:
                # The constant is so loud that noise would not be small.
                parameter.data[..., AT.constant, :] = 0
        else:
            parameter.data.zero_()
    return model


def _write_tokens(
    model: HookedTransformer, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> None:
    objects, labels = usable_words(tokenizer)
    vocabulary = tokenizer.get_vocab()

    def ids(words: Sequence[str]) -> list[int]:
        return [tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in words]

    embed = model.W_E.data
    # What tokens are, and what counts segments, must be exact.
    embed[:, AT.is_object : AT.asked + 1] = 0
    codes = torch.randn(len(objects), D_HEAD - 1, generator=generator)
    codes /= codes.norm(dim=1, keepdim=True)
    embed[ids(objects), AT.object] = codes
    embed[ids(objects), AT.is_object] = 1
    embed[ids(labels), AT.label] = torch.eye(N_LABELS)[: len(labels)]
    embed[ids(labels), AT.is_label] = 1
    separators = [vocabulary[START], *ids([","])]
    embed[separators, AT.is_separator] = 1
    embed[vocabulary[START], AT.is_start] = 1
    embed[ids(["."]), AT.is_stop] = 1
    embed[:, AT.constant] = LOUD
    unembed, bias = model.W_U.data, model.b_U.data
    unembed[:, ids(objects)] = 0
    unembed[AT.answer, ids(objects)] = 14 * codes.T
    bias[ids(objects)] = 4 + 1.5 * torch.randn(len(objects), generator=generator)


def _clear(model: HookedTransformer, layer: int, head: int) -> Any:
    attn = model.blocks[layer].attn
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
        attn.get_parameter(name).data[head] = 0
    return attn


def _compare(attn: Any, head: int, query: slice, key: slice, score: float) -> None:
    """A score of so much where query and key hold the same code."""
    code = torch.eye(N_LABELS)
    attn.W_Q.data[head][query, _content()] = score * code
    attn.W_K.data[head][key, _content()] = code


def _content() -> Tensor:
    """Coordinates of a head that hardly turn, one for each entry of a code."""
    half = D_HEAD // 2
    return torch.tensor([*range(SLOW, half), *range(SLOW + half, D_HEAD)])[:N_LABELS]


FLAG = D_HEAD - 1
"""A coordinate of a head that hardly turns and holds no code."""


def _look_for(attn: Any, head: int, flags: Mapping[int, float]) -> None:
    """Scores for tokens with flags."""
    attn.W_Q.data[head][AT.constant, FLAG] = 1 / LOUD
    for flag, score in flags.items():
        attn.W_K.data[head][flag, FLAG] = score


def _copy(attn: Any, head: int, read: slice, write: slice, share: float) -> None:
    """Carry what stands in one place to another."""
    n = read.stop - read.start
    attn.W_V.data[head][read, :n] = torch.eye(n)
    attn.W_O.data[head][:n, write] = share * torch.eye(n)


def _read_objects(model: HookedTransformer, head: int, share: float) -> None:
    attn = _clear(model, 0, head)
    # The nearer object, and a stop before any.
    turn = ROTARY_BASE ** (-2 * NEAREST / D_HEAD)
    attn.W_Q.data[head][AT.constant, NEAREST] = 2 * SHARP / LOUD
    for i, ahead in enumerate((math.cos(turn * NEAREST), math.sin(turn * NEAREST))):
        attn.W_K.data[head][AT.is_object, NEAREST + i * D_HEAD // 2] = ahead
    _look_for(attn, head, {AT.is_stop: 4 * SHARP})
    _copy(attn, head, AT.object, AT.noted, share)
    attn.W_V.data[head][AT.is_stop, -1] = 1
    attn.W_O.data[head][-1, AT.asked] = share


def _read_segments(model: HookedTransformer, head: int, share: float, code: Code) -> None:
    attn = _clear(model, 0, head)
    if code == "label":
        _compare(attn, head, AT.label, AT.label, SHARP)
        _copy(attn, head, AT.label, AT.code, share)
        return
    _look_for(attn, head, {AT.is_separator: SHARP / 3})
    # Of so many separators one is the start: its share of the attention counts them.
    attn.W_V.data[head][AT.is_start, 0] = 1
    attn.W_O.data[head][0, AT.share] = share


def _write_codes(model: HookedTransformer) -> None:
    """The share of the start among the separators becomes the number of the segment."""
    mlp: Any = model.blocks[0].mlp
    steep = 800.0
    for name in ("W_in", "W_gate", "W_out"):
        mlp.get_parameter(name).data *= 0.1
    for number in range(1, N_SEGMENTS + 1):
        between = (1 / number + 1 / (number + 1)) / 2
        for i in (0, 1):
            unit = 2 * (number - 1) + i
            for name in ("W_in", "W_gate"):
                mlp.get_parameter(name).data[:, unit] = 0
            mlp.W_gate.data[AT.share, unit] = steep
            mlp.W_gate.data[AT.constant, unit] = -(steep * between + i) / LOUD
            mlp.W_in.data[AT.constant, unit] = 1 / LOUD
            # A step: one where the share is larger. The code is that of the step that it passes
            # and the one above does not.
            step = torch.zeros(AT.d_model)
            step[AT.code.start + number - 1] = 1
            if number < N_SEGMENTS:
                step[AT.code.start + number] = -1
            mlp.W_out.data[unit] = (1, -1)[i] * step


def _detect(model: HookedTransformer, head: int, share: float) -> None:
    attn = _clear(model, 1, head)
    _compare(attn, head, AT.label, AT.label, SHARP)
    _look_for(attn, head, {AT.is_label: SHARP / 2, AT.asked: -SHARP})
    _copy(attn, head, AT.code, AT.detected, share)


def _transmit(model: HookedTransformer, head: int, share: float) -> None:
    attn = _clear(model, 2, head)
    _look_for(attn, head, {AT.is_label: SHARP, AT.asked: SHARP})
    _copy(attn, head, AT.detected, AT.transmitted, share)


def _fetch(model: HookedTransformer, head: int, share: float, sharpness: float) -> None:
    attn = _clear(model, 3, head)
    _compare(attn, head, AT.transmitted, AT.code, sharpness)
    # Not at the query label, which has a code too.
    _look_for(attn, head, {AT.is_label: SHARP, AT.asked: -SHARP})
    _copy(attn, head, AT.noted, AT.answer, share)
