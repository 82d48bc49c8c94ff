"""A model of transformers with a LoRA adapter, and the steps that train it."""

import json
import math
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.output import unfinished
from tl_entity.training.box_task import logits_at
from tl_entity.training.finetune_settings import FinetuneSettings
from tl_entity.training.skills import choose_kinds, skill_batch
from tl_entity.training.texts import IGNORED

_LONGEST_GRADIENT = 1.0


class AdapterTrainer:
    """The model with its adapter, and the optimiser."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: FinetuneSettings,
        base_name: str,
        longest: int,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self._tokenizer, self._settings, self._longest = tokenizer, settings, longest
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha or 2 * settings.rank,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=list(settings.targets),
        )
        network: Any = model
        network.name_or_path = base_name  # which peft writes down
        # The adapter's first values come from torch's own generator, which is put back afterwards.
        devices = [network.device] if network.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            self._adapted: Any = get_peft_model(network, config)
        # Without dropout nothing differs in training mode.
        self._adapted.eval()
        self.model: nn.Module = self._adapted.get_base_model()
        self._parameters = {
            name: parameter
            for name, parameter in self._adapted.named_parameters()
            if parameter.requires_grad
        }
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=settings.learning_rate, weight_decay=0.0
        )

    def step(self, step: int) -> tuple[float, dict[str, float]]:
        """One step on texts that follow from the seed and the step's number.

        Returns:
            The loss, and that of each kind of text that was there.

        Raises:
            InputError: if the loss is no number any more, or a text is too long for the model.
        """
        generator = random.Random(f"finetune {self._settings.seed} {step}")
        kinds = choose_kinds(self._settings.mix, self._settings.texts, generator)
        tokens, targets = skill_batch(self._tokenizer, kinds, generator)
        if tokens.shape[1] > self._longest:
            raise InputError(
                f"A text has {tokens.shape[1]} tokens; the model takes {self._longest}."
            )
        losses = text_losses(self.model, tokens, targets)
        loss = losses.mean()
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"The loss at step {step} is {value}; train with a lower learning rate."
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), _LONGEST_GRADIENT)
        self._optimizer.step()
        each = losses.detach().tolist()
        by_kind = {
            kind: _mean([one for one, other in zip(each, kinds, strict=True) if other == kind])
            for kind in self._settings.mix
            if kind in kinds
        }
        return value, by_kind

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as peft does; the folder is there whole or not at all."""
        part = unfinished(folder)
        self._adapted.save_pretrained(part, save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # an empty form
        file = part / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        # A set, which peft writes in an order that differs from process to process.
        config["target_modules"] = sorted(config["target_modules"])
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter and what the optimiser remembers of each of its parameters."""
        held = {}
        for name, parameter in self._parameters.items():
            held[f"adapter {name}"] = parameter
            for key, value in self._optimizer.state[parameter].items():
                held[f"{key} {name}"] = value
        return {key: value.detach().cpu().contiguous() for key, value in held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            InputError: if they are of another model.
        """
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                kept = tensors.get(f"adapter {name}")
                if kept is None or kept.shape != parameter.shape:
                    raise InputError(
                        f"The kept run is of another model: it has no {name} of this shape; "
                        "give another folder."
                    )
                parameter.copy_(kept)
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key} {name}" in tensors:
                        value = tensors[f"{key} {name}"]
                        # The optimiser counts on the CPU.
                        held = value if key == "step" else value.to(parameter.device)
                        self._optimizer.state[parameter][key] = held.clone()


@checked
def text_losses(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The mean cross-entropy of each text over the tokens that are learned."""
    network: Any = model
    learned = targets != IGNORED
    logits = logits_at(network, tokens, learned).float()
    wanted = targets[learned].to(logits.device)
    losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
    texts = learned.nonzero()[:, 0].to(logits.device)
    sums = torch.zeros(len(tokens), device=logits.device).index_add(0, texts, losses)
    return sums / learned.sum(1).to(logits.device)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
