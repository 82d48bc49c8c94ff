"""Where weights come from: a folder, or a transformers model in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.models.files import read_tensors, reason, weight_files
from tl_entity.models.hub import TOKENIZER_FILES, find_folder
from tl_entity.models.registry import check_checkpoint_folder
from tl_entity.models.tokenizers import read_tokenizer
from tl_entity.reading import read_json

EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A source of weights.

    Attributes:
        place: names it in messages.
        config: what transformers makes of it.
        tensors: opens it: (file or place, name, tensor) one by one, in Hugging Face's names and
            layout; views of mapped files where they can be.
        tokenizer: reads the checkpoint's own tokenizer; None if there is none to be had.
    """

    place: str
    config: PretrainedConfig
    tensors: Callable[[], Iterator[tuple[str, str, Tensor]]]
    tokenizer: Callable[[], PreTrainedTokenizerBase | None]


def folder_checkpoint(folder: Path) -> Checkpoint:
    """A folder with config.json, weights and a tokenizer, as transformers saves it."""

    def tensors() -> Iterator[tuple[str, str, Tensor]]:
        for file in weight_files(folder):
            for key, tensor in read_tensors(file):
                yield str(file), key, tensor

    return Checkpoint(str(folder), _read_config(folder), tensors, lambda: read_tokenizer(folder))


def memory_checkpoint(model: nn.Module) -> Checkpoint:
    """A causal language model of transformers; its parameters are shared, not copied.

    Raises:
        InputError: if it is no such model, carries an adapter, or is not in memory as a whole.
    """
    kind = type(model).__name__
    parameters = model.state_dict(keep_vars=False)
    if any(".lora_" in key or ".base_layer." in key for key in parameters):
        raise InputError(
            f"The {kind} carries an adapter; call merge_and_unload() on it first, or load its base "
            "and give the adapter's folder as adapter=."
        )
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise InputError(f"A {kind} is no causal language model of transformers.")
    if any(parameter.is_meta for parameter in parameters.values()):
        raise InputError(f"Some weights of the {kind} are not in memory but offloaded.")

    def tensors() -> Iterator[tuple[str, str, Tensor]]:
        for key, tensor in parameters.items():
            yield f"the {kind}", key, tensor.detach()

    def tokenizer() -> PreTrainedTokenizerBase | None:
        # A model doesn't carry its tokenizer; where it came from may still be at hand.
        name = model.name_or_path
        try:
            if not name:
                return None
            return read_tokenizer(find_folder(name, TOKENIZER_FILES, local_files_only=True))
        except InputError:
            return None

    return Checkpoint(f"the {kind}", model.config, tensors, tokenizer)


def _read_config(folder: Path) -> PretrainedConfig:
    file = folder / "config.json"
    check_checkpoint_folder(folder)
    kind = read_json(file).get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an unknown model_type and bad values raise different kinds
        raise InputError(
            f"{file} (model_type {kind!r}) is no configuration that can be read: {reason(error)}"
        ) from None
