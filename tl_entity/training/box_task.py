"""The box task as a fine-tune is measured on it: a model of transformers, adapter and all."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.stats import Interval, wilson_interval
from tl_entity.tasks.batches import PromptBatch
from tl_entity.tasks.boxes import mark_sentence, sample_prompts, usable_words
from tl_entity.tasks.marked import MarkedText, tokenize_marked
from tl_entity.training.measure import HELD_OUT_SEED

_BATCH = 10


@checked
@dataclass(frozen=True)
class Evaluation:
    """The box task after some steps.

    Attributes:
        step: how many steps were done before.
        n: prompts.
        correct: those whose likeliest next token, of the whole vocabulary, is the answer.
        correct_among_objects: those whose answer is the likeliest of the prompt's own objects.
    """

    step: int
    n: int
    correct: int
    correct_among_objects: int

    @property
    def accuracy(self) -> float:
        """Over the whole vocabulary."""
        return self.correct / self.n

    @property
    def interval(self) -> Interval:
        """Of the accuracy, 95 %."""
        return wilson_interval(self.correct, self.n)

    @property
    def accuracy_among_objects(self) -> float:
        """With only the prompt's own objects to choose from."""
        return self.correct_among_objects / self.n

    @property
    def interval_among_objects(self) -> Interval:
        """Of the accuracy among objects, 95 %."""
        return wilson_interval(self.correct_among_objects, self.n)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **dataclasses.asdict(self),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "accuracy_among_objects": self.accuracy_among_objects,
            "interval_among_objects": list(self.interval_among_objects),
        }

    def __str__(self) -> str:
        return (
            f"step {self.step:>4}: {self.accuracy:.3f} {self.interval} of {self.n} box prompts, "
            f"{self.accuracy_among_objects:.3f} {self.interval_among_objects} among their objects"
        )


@checked
@dataclass(frozen=True)
class BoxTask:
    """Box prompts to measure a model of transformers on.

    Attributes:
        batch: the prompts.
        objects: token ids of the objects in each prompt.
    """

    batch: PromptBatch
    objects: Int[Tensor, "batch boxes"]

    @classmethod
    def sample(cls, tokenizer: PreTrainedTokenizerBase, n: int, *, n_boxes: int) -> "BoxTask":
        """Prompts from a seed that no training uses, always the same for one tokenizer.

        Raises:
            InputError: if the tokenizer has too few one-token objects or labels.
        """
        objects, labels = usable_words(tokenizer)
        prompts = sample_prompts(
            n, n_boxes=n_boxes, seed=HELD_OUT_SEED + n_boxes, objects=objects, labels=labels
        )
        batch = tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], tokenizer)
        words = sorted({word for prompt in prompts for word in prompt.objects})
        # As answers are: the token of the word where it follows another and a space.
        answers = tokenize_marked([MarkedText("the", {}, word) for word in words], tokenizer)
        ids = dict(zip(words, answers.answers.tolist(), strict=True))
        return cls(batch, torch.tensor([[ids[word] for word in p.objects] for p in prompts]))

    @checked
    def evaluate(self, model: nn.Module, step: int = 0) -> Evaluation:
        """How many prompts the model answers right."""
        logits = self.answer_logits(model)
        rows = torch.arange(len(logits))
        among = self.objects[rows, logits.gather(1, self.objects).argmax(1)]
        return Evaluation(
            step,
            n=len(logits),
            correct=int((logits.argmax(1) == self.batch.answers).sum()),
            correct_among_objects=int((among == self.batch.answers).sum()),
        )

    @checked
    def answer_logits(self, model: nn.Module) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the end of each prompt, on the CPU."""
        network: Any = model
        with torch.no_grad():
            # Few at a time, since attention patterns are held whole.
            return torch.cat(
                [
                    logits_at(
                        network,
                        chunk.tokens,
                        torch.arange(chunk.tokens.shape[1]) == chunk.positions["last"][:, None],
                    )
                    .float()
                    .cpu()
                    for chunk in self.batch.chunks(_BATCH)
                ]
            )


def logits_at(network: Any, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Logits at the tokens wanted: of a large vocabulary, far cheaper than those at all tokens.

    Padding stands on the right, where a causal model does not look: no mask is needed.
    """
    hidden = network.get_decoder()(tokens.to(network.device), use_cache=False).last_hidden_state
    return network.get_output_embeddings()(hidden[wanted.to(hidden.device)])
