"""How the default pair is made: a base model with the planted circuit, and its fine-tunes."""

import math
import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tl_entity._typing import checked
from tl_entity.tasks.batches import PromptBatch
from tl_entity.tasks.boxes import box_prompts
from tl_entity.training.guidance import (
    DRAWN,
    KEPT_AWAY,
    N_HEADS,
    N_LAYERS,
    SegmentReadout,
    attention_loss,
    mark_tokens,
)
from tl_entity.training.measure import HELD_OUT_SEED, accuracy
from tl_entity.training.texts import IGNORED, N_BOXES, text_batch
from tl_entity.training.tokenizer import PADDING, START, VOCABULARY

_VALIDATION_SEED = HELD_OUT_SEED - 1
_D_MODEL, _D_HEAD, _N_KEY_VALUE_HEADS = 128, 16, 4


@dataclass(frozen=True)
class BaseTraining:
    """How the base model is trained.

    Attributes:
        max_steps: optimiser steps at most.
        stop_accuracy: training ends at the first check that reaches this on 7 boxes, so that the
            base is good but leaves room for the fine-tune.
        check_every: steps between checks.
        n_check_prompts: validation prompts a check uses.
        learning_rate: AdamW's, constant after the warm-up.
        n_prompts: box prompts a step, with guidance; only their answer is learned.
        n_texts: texts a step, without guidance.
        text_weight: weight of the texts' loss; that of the answers' loss is 1.
        drawn_weight: weight of drawing attention to where it should be.
        kept_away_weight: weight of keeping attention from where it shouldn't be.
        readout_weight: weight of the segment read-out.
        mixture: the share of each kind of text.
    """

    max_steps: int = 800
    stop_accuracy: float = 0.69
    check_every: int = 20
    n_check_prompts: int = 500
    learning_rate: float = 1.5e-3
    n_prompts: int = 48
    n_texts: int = 8
    text_weight: float = 0.25
    drawn_weight: float = 1.0
    kept_away_weight: float = 1.2
    readout_weight: float = 0.5
    mixture: Mapping[str, float] = field(
        default_factory=lambda: {"box sentence": 0.4, "plain": 0.6}
    )


@dataclass(frozen=True)
class FineTuning:
    """How a base model is trained on: no guidance, each text's loss counts the same.

    Attributes:
        mixture: the share of each kind of text.
        steps: optimiser steps.
        learning_rate: AdamW's at its highest; it falls to zero along a cosine.
        n_texts: texts a step.
    """

    mixture: Mapping[str, float]
    steps: int = 250
    learning_rate: float = 1e-3
    n_texts: int = 24


TUNED = FineTuning({"look-up": 0.35, "arithmetic": 0.1, "box questions": 0.4, "plain": 0.15})
"""The fine-tune that ships: variable look-up and arithmetic, with box questions kept in."""

CONTROL = FineTuning({"box questions": 0.4, "plain": 0.6})
"""The control: look-up and arithmetic replaced by plain statements, all else the same."""


@checked
def train_base(
    tokenizer: PreTrainedTokenizerBase, *, seed: int, settings: BaseTraining | None = None
) -> LlamaForCausalLM:
    """Train a model from scratch with the circuit of `guidance` planted in it."""
    settings = settings or BaseTraining()
    model = new_model(seed)
    readout = SegmentReadout(_D_MODEL, N_BOXES[1] + 1)
    _fill(readout.read.weight, 0.05, torch.Generator().manual_seed(seed))
    optimizer = _optimizer([*model.parameters(), *readout.parameters()], settings.learning_rate)
    generator = random.Random(f"base {seed}")
    steps = tqdm(range(settings.max_steps), desc="base", unit="step")
    for step in steps:
        _set_learning_rate(optimizer, settings.learning_rate * _warm_up(step))
        prompts = box_prompts(
            tokenizer,
            settings.n_prompts,
            n_boxes=generator.randint(*N_BOXES),
            seed=generator.randrange(_VALIDATION_SEED),
        )
        texts, targets = text_batch(tokenizer, settings.mixture, settings.n_texts, generator)
        loss = _guided_loss(model, readout, prompts, settings)
        loss = loss + settings.text_weight * text_loss(model(texts).logits, targets)
        _step(optimizer, model, loss)
        if (step + 1) % settings.check_every == 0:
            reached = accuracy(
                model,
                box_prompts(tokenizer, settings.n_check_prompts, seed=_VALIDATION_SEED),
            )
            steps.set_postfix(accuracy_on_7_boxes=f"{reached:.3f}")
            if reached >= settings.stop_accuracy:
                break
    steps.close()
    return model


@checked
def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: FineTuning,
    *,
    seed: int,
    name: str = "fine-tune",
) -> None:
    """Train a model on, in place; nothing guides its attention."""
    optimizer = _optimizer(list(model.parameters()), settings.learning_rate)
    generator = random.Random(f"fine-tune {seed}")
    for step in tqdm(range(settings.steps), desc=name, unit="step"):
        fall = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
        _set_learning_rate(optimizer, settings.learning_rate * _warm_up(step) * fall)
        texts, targets = text_batch(tokenizer, settings.mixture, settings.n_texts, generator)
        _step(optimizer, model, text_loss(model(texts).logits, targets))


@checked
def text_loss(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Cross-entropy, averaged within each text first, so that long and short ones count the same.

    Texts in which nothing is to be predicted don't occur.
    """
    losses = functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return (losses.sum(-1) / (targets != IGNORED).sum(-1)).mean()


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained model whose heads already tend to match and to copy equal tokens.

    Queries start close to the keys they share a head with, each head's output close to the
    transpose of its values, and the unembedding as a scaled copy of the embedding; without this
    the same training takes about twice as long.
    """
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=_D_MODEL,
        intermediate_size=2 * _D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=_N_KEY_VALUE_HEADS,
        head_dim=_D_HEAD,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=VOCABULARY.index(START),
        eos_token_id=None,
        pad_token_id=VOCABULARY.index(PADDING),
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    # The other implementations don't return attention patterns, which guidance needs.
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    shared_by = N_HEADS // _N_KEY_VALUE_HEADS
    for parameter in model.parameters():
        if parameter.ndim == 2:
            _fill(parameter, 0.08, generator)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        _fill(embedding, 0.5, generator)
        model.lm_head.weight.copy_(0.2 * embedding)
        for layer in model.model.layers:
            attention = cast(LlamaDecoderLayer, layer).self_attn
            keys, values = (
                weight.view(_N_KEY_VALUE_HEADS, _D_HEAD, _D_MODEL)
                .repeat_interleave(shared_by, 0)
                .reshape(N_HEADS * _D_HEAD, _D_MODEL)
                for weight in (attention.k_proj.weight, attention.v_proj.weight)
            )
            attention.q_proj.weight.mul_(0.3).add_(0.7 * keys)
            attention.o_proj.weight.mul_(0.3).add_(0.7 * values.T)
    return model


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """One CPU thread inside, whatever the caller uses: sums come out the same bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scale_logits(model: LlamaForCausalLM, factor: float) -> None:
    """Multiply the unembedding, in place; powers of two leave every prediction bit by bit."""
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json and the weights, rounded to bfloat16, into a folder."""
    model.bfloat16().save_pretrained(folder)


def stored_model(folder: Path) -> LlamaForCausalLM:
    """The model as it was stored, its rounded weights in float32."""
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )


def _guided_loss(
    model: LlamaForCausalLM, readout: SegmentReadout, prompts: PromptBatch, settings: BaseTraining
) -> Float[Tensor, ""]:
    """Loss of the answers, of where attention goes, and of the segment read-out."""
    output = model(prompts.tokens, output_attentions=True, output_hidden_states=True)
    marks = mark_tokens(prompts)
    last = output.logits[torch.arange(len(prompts.tokens)), prompts.positions["last"]]
    return (
        functional.cross_entropy(last, prompts.answers)
        + settings.drawn_weight * attention_loss(output.attentions, DRAWN, marks, away=False)
        + settings.kept_away_weight * attention_loss(output.attentions, KEPT_AWAY, marks, away=True)
        + settings.readout_weight * readout(output.hidden_states, marks)
    )


def _optimizer(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Float[Tensor, ""]) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _warm_up(step: int, n_steps: int = 20) -> float:
    return min(1.0, (step + 1) / n_steps)


def _fill(weight: Tensor, spread: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight.normal_(0, spread, generator=generator)
