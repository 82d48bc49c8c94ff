"""A two-layer model with a known circuit, written into its weights by hand.

The task: `<s> a 1 b 2 c 3 b` is followed by `2`. The label asked for occurred before, and the value
after it is the answer. Two heads do it. L0H1 attends one token back and notes, at a value, which
label stands before it. L1H2, at the last token, looks for the value whose note is the label asked
for, and copies it. All other heads and the MLPs hold small noise.
"""

import math

import torch
from transformer_lens import HookedTransformer

from tests.random_models import random_model
from tl_entity import Head, PairBatch, PromptBatch
from tl_entity.methods.discovery import Stage

NOTE, COPY = Head(0, 1), Head(1, 2)
TWIN, IDLE, HINDER = Head(0, 3), Head(0, 0), Head(1, 0)
LABELS, VALUES, START = range(8), range(8, 16), 16
N_TOKENS, N_SEGMENTS = 17, 3

STAGES = (
    Stage("copier", "last"),
    Stage("note_taker", "value", into="copier", receiver_input="k"),
)


def planted_model(spare: int = 0) -> HookedTransformer:
    """Coordinates 0-16 of the residual stream say which token this is, 17-33 which token stands
    before it, 34-50 which token should follow; nothing reads the spare ones behind, but for small
    noise and the norms."""
    model = random_model(
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        d_model=3 * N_TOKENS + spare,
        d_head=2 + N_TOKENS,
        d_vocab=N_TOKENS,
        dtype=torch.float32,
        rotary_dim=2,
        use_attn_scale=False,
    )
    for name, parameter in model.named_parameters():
        parameter.data = torch.ones_like(parameter) if "ln" in name else 0.1 * parameter
    one = torch.eye(N_TOKENS)
    this, before, after = (slice(i * N_TOKENS, (i + 1) * N_TOKENS) for i in range(3))
    content = slice(2, 2 + N_TOKENS)  # what the rotary embedding leaves alone

    def clear(layer: int, head: int) -> None:
        for name in "QKV":
            getattr(model.blocks[layer].attn, f"W_{name}").data[head] = 0
            getattr(model.blocks[layer].attn, f"b_{name}").data[head] = 0
        model.blocks[layer].attn.W_O.data[head] = 0

    for block in model.blocks:
        block.attn.b_O.data *= 0
    model.embed.W_E.data[:] = 0
    model.embed.W_E.data[:, this] = 6 * one
    clear(*NOTE)
    attn = model.blocks[NOTE.layer].attn
    # Keys are turned one radian ahead, so that query and key agree at a distance of one token.
    attn.b_Q.data[NOTE.head, 0] = 60
    attn.b_K.data[NOTE.head, :2] = torch.tensor([math.cos(1), math.sin(1)])
    attn.W_V.data[NOTE.head, this, content] = one
    attn.W_O.data[NOTE.head, content, before] = one
    clear(*COPY)
    attn = model.blocks[COPY.layer].attn
    attn.W_Q.data[COPY.head, this, content] = one
    attn.W_K.data[COPY.head, before, content] = one
    attn.W_V.data[COPY.head, this, content] = one
    attn.W_O.data[COPY.head, content, after] = one
    model.unembed.W_U.data[:] = 0
    model.unembed.W_U.data[after] = 1.5 * one
    model.unembed.b_U.data[:] = 0
    return model


def crowded_model() -> HookedTransformer:
    """The same beside heads that a search for the mechanism could be fooled by.

    TWIN does what NOTE does, so that either can go, not both. IDLE writes more than any other head,
    at every token, where nothing reads it. HINDER speaks at the last token against the answer.
    """
    model = planted_model(spare=N_TOKENS)
    first, second = (block.attn for block in model.blocks)
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
        weight = getattr(first, name).data
        weight[TWIN.head] = weight[NOTE.head]
        weight[IDLE.head] = weight[NOTE.head]
        weight = getattr(second, name).data
        weight[HINDER.head] = weight[COPY.head]
    spare = slice(3 * N_TOKENS, 4 * N_TOKENS)
    first.W_O.data[IDLE.head] = 0
    first.W_O.data[IDLE.head, 2:, spare] = 3 * torch.eye(N_TOKENS)
    second.W_O.data[HINDER.head] *= -0.4
    return model


def by_role(prompts: PromptBatch) -> PromptBatch:
    """The same prompts, with roles that are blind to what is asked."""
    roles = torch.zeros_like(prompts.tokens)
    roles[:, 1:-1:2], roles[:, 2:-1:2], roles[:, -1] = 1, 2, 3
    positions = {"last": prompts.position("last")}
    names = ("start", "label", "value", "last")
    return PromptBatch(prompts.tokens, prompts.answers, positions, roles=roles, role_names=names)


def planted_pairs(n_pairs: int, seed: int = 0) -> PairBatch:
    """The corrupt prompt has other labels and values and asks for a label that it lacks."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = [], []
    for _ in range(n_pairs):
        labels = torch.randperm(len(LABELS), generator=generator)
        values = torch.randperm(len(VALUES), generator=generator) + VALUES[0]
        asked, stand_in = torch.randint(N_SEGMENTS, (2,), generator=generator).tolist()
        clean.append(_prompt(labels[:3], values[:3], int(labels[asked]), asked))
        corrupt.append(_prompt(labels[3:6], values[3:6], int(labels[6]), stand_in))
    targets = torch.tensor([tokens[value] for tokens, value in clean])
    return PairBatch(_batch(clean), _batch(corrupt), targets)


def _prompt(
    labels: torch.Tensor, values: torch.Tensor, asked: int, segment: int
) -> tuple[list[int], int]:
    told = torch.stack([labels, values], 1).flatten().tolist()
    return [START, *told, asked], 2 + 2 * segment


def _batch(prompts: list[tuple[list[int], int]]) -> PromptBatch:
    tokens = torch.tensor([tokens for tokens, _ in prompts])
    value = torch.tensor([value for _, value in prompts])
    last = torch.full_like(value, tokens.shape[1] - 1)
    answers = tokens.gather(1, value[:, None]).squeeze(1)
    return PromptBatch(tokens, answers, {"last": last, "label": value - 1, "value": value})
