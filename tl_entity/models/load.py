"""`load_model`: from a name, a folder, a file, a hub id or a model in memory to a HookedTransformer
with the same numbers."""

import copy
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.devices import check_device
from tl_entity.errors import InputError
from tl_entity.models.adapter import Adapter, adapted_config
from tl_entity.models.adapter_files import read_adapter
from tl_entity.models.assembling import copy_rotary_tables as copy_rotary_tables
from tl_entity.models.assembling import empty as empty
from tl_entity.models.assembling import folded as folded
from tl_entity.models.assembling import place_buffers as place_buffers
from tl_entity.models.assembling import share_buffers as share_buffers
from tl_entity.models.bridge import bridge
from tl_entity.models.checkpoint import Checkpoint, folder_checkpoint, memory_checkpoint
from tl_entity.models.config import check_config, hooked_config
from tl_entity.models.gguf_file import gguf_checkpoint, gguf_tokenizer
from tl_entity.models.hub import ADAPTER_FILES, MODEL_FILES, TOKENIZER_FILES, find_folder
from tl_entity.models.registry import gguf_on_hub, locate, registered
from tl_entity.models.tokenizers import (
    fit_to_vocabulary,
    prepends_bos,
    read_adapter_tokenizer,
    read_tokenizer,
)
from tl_entity.models.weights import (
    building,
    install_weights,
    share_weights,
)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What weights and activations can be held in."""


@overload
def load_model(
    name_or_path: str | Path | nn.Module,
    *,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    backend: Literal["hooked"] = "hooked",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    n_devices: int = 1,
    fold_norms: bool = False,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> HookedTransformer: ...


@overload
def load_model(
    name_or_path: str | Path | nn.Module,
    *,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    backend: Literal["bridge"],
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    n_devices: int = 1,
    fold_norms: bool = False,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> TransformerBridge: ...


@checked
@torch.inference_mode(False)  # whose tensors no gradient could ever pass
def load_model(
    name_or_path: str | Path | nn.Module,
    *,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    backend: Literal["hooked", "bridge"] = "hooked",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    n_devices: int = 1,
    fold_norms: bool = False,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> HookedTransformer | TransformerBridge:
    """A Llama-family checkpoint as a HookedTransformer with the numbers of Hugging Face's model.

    Weights do not require gradients, and are not centred; nor are they folded, unless `fold_norms`
    says so. **On a model that is not folded, TransformerLens's own tools that multiply the residual
    stream by the unembedding (direct logit attribution, `logit_attrs` of a cache) leave out the
    weights of the final norm: their numbers are silently wrong.** Load the model with
    `fold_norms=True` for them; the methods of this package take either.

    In the checkpoint's own dtype, on the CPU, weights are not copied either but views of its
    memory-mapped files: leave those in place while the model lives. A change to a weight stays in
    memory and never reaches the file. Another dtype or device makes one copy, matrix by matrix; an
    adapter copies what it changes.

    The tokenizer is the checkpoint's own, at `model.tokenizer`, and its tokens are those of the
    checkpoint's tokenizer.json; an adapter's folder that has a tokenizer brings that one instead.
    `model.to_tokens(text)` gives the tokens that it gives, with a beginning-of-sequence token if
    and only if it puts one; for a text that a chat template rendered, which has that token already,
    say `prepend_bos=False` (the prompts of `tl_entity` see to it themselves).

    Args:
        name_or_path: a name from the registry ("default-base", "llama-7b", ...; `tl-entity models`
            lists them); a folder with config.json, weights (safetensors, or `.bin` pickles, of
            which only tensors are read) and a tokenizer; a GGUF file; a Hugging Face hub id
            (`owner/name`, or `owner/name/file.gguf` for a GGUF file there); or a causal language
            model of transformers, whose weights are then shared with it.
        adapter: a LoRA adapter to merge, plain, rank-stabilised or DoRA: folder or hub id. It is
            merged in float32, and the base's files or model stay as they are. Whole modules, rows
            of tokens and embeddings that it holds are used as peft uses them; with embeddings of
            another size, the model has as many tokens as these have rows.
        gguf_file: the name of a GGUF file in the folder or hub repository. Quantised numbers are
            decoded; the tokenizer is the one beside the file, if there is one with its vocabulary,
            or else the file's own.
        dtype: of weights and activations: "float32", "float64", "float16", "bfloat16".
        device: such as "cpu" or "cuda:1"; CUDA where there is one if left out.
        backend: "hooked"; "bridge" for a TransformerBridge, Hugging Face's own modules with
            TransformerLens's hook points. It also takes what HookedTransformer can't represent:
            biases inside the MLP, and Hugging Face's other activations and rotary embeddings.
        tokenizer: one to use instead of the checkpoint's or the adapter's own, or where it is
            found. A model in memory brings none; the one of where it came from is used if that is
            on this machine.
        n_devices: CUDA devices to spread the layers over, from `device` on.
        fold_norms: multiply the weights of each norm into the matrices that read it, as
            TransformerLens's tools expect ("RMSPre"): those of the final norm into the unembedding,
            those of the others into W_Q, W_K, W_V, W_gate and W_in. Logits and activations
            stay the same up to float rounding (but for `unembed.hook_in`, which a weight precedes);
            nothing is centred. These matrices are then copies in memory, and no views of the file
            any more: all weights but W_O, W_out and the embedding, and of tied embeddings a second
            one. In float32 or float64 only, where the products are exact but for the last digit,
            and not on a bridge.
        revision: a branch, tag or commit of the model's hub repository.
        adapter_revision: likewise for the adapter's.
        token: for gated or private repositories; by default the one that the environment (HF_TOKEN)
            or `hf auth login` gives.
        local_files_only: only what is on this machine, the hub's cache included. HF_HUB_OFFLINE=1
            does the same for the whole process.

    Raises:
        InputError: if the checkpoint is not there, is damaged, or cannot be represented exactly;
            the message says what and where.
        NotFiniteError: if a weight is NaN or infinite, or too large for `dtype`, naming file and
            tensor.
    """
    number, place = _dtype(dtype), usable_device(device, n_devices)
    if backend == "bridge" and n_devices > 1:
        raise InputError("A TransformerBridge is loaded onto one device; leave n_devices at 1.")
    if fold_norms:
        _check_foldable(backend, number)
    access: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    entry = None if isinstance(name_or_path, nn.Module) else registered(name_or_path)
    if entry is not None and adapter is None:
        adapter = entry.adapter
    checkpoint = find_checkpoint(name_or_path, gguf_file, revision=revision, **access)
    folder = merged = None
    if adapter is not None:
        folder = find_folder(adapter, ADAPTER_FILES, revision=adapter_revision, **access)
        merged = read_adapter(folder)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, **access)
    check_config(checkpoint.config, place=checkpoint.place)
    config = adapted_config(checkpoint.config, merged)
    cfg = None
    if backend == "hooked":
        # What it can't represent is known before anything is read.
        cfg = hooked_config(config, dtype=number, device=place, place=checkpoint.place)
        cfg.n_devices = n_devices
    own = _choose_tokenizer(tokenizer, folder, config.vocab_size)
    if own is None:
        own = checkpoint.tokenizer()
        if own is not None:
            # The base's own, even where an adapter has fewer embeddings than the base.
            size = max(config.vocab_size, checkpoint.config.vocab_size)
            fit_to_vocabulary(own, size, f"The tokenizer of {checkpoint.place}")
    with building:
        if cfg is None:
            return bridge(checkpoint, merged, own, dtype=number, device=place)
        model = empty(cfg)
        install_weights(model, checkpoint, merged)
        place_buffers(model)
        copy_rotary_tables(model, checkpoint.config)
        return _finished(folded(model) if fold_norms else model, own)


@checked
def load_tokenizer(
    name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, padding on the right, without loading the weights.

    Where it has no padding token, its end token stands in (or its unknown token); padding is
    masked, so which one it is changes nothing.

    Args:
        name_or_path: as for `load_model`; of a hub repository only the tokenizer is fetched.
        gguf_file: as for `load_model`.
        revision: as for `load_model`.
        token: as for `load_model`.
        local_files_only: as for `load_model`.

    Raises:
        InputError: if there is none that can be read.
    """
    access: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
    }
    file = _gguf(name_or_path, gguf_file, **access)
    if file is not None:
        return gguf_tokenizer(file)
    return read_tokenizer(find_folder(name_or_path, TOKENIZER_FILES, **access))


@checked
@torch.inference_mode(False)
def with_adapter(
    model: HookedTransformer,
    adapter: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> HookedTransformer:
    """Another model: this one with a LoRA adapter merged. This one stays as it is.

    The two share every weight that the adapter does not change, so that several adapters can be
    studied on one base in little more memory than the base's. For the most exact merge give
    `adapter` to `load_model`: here the base is taken in the dtype that it was loaded in.

    The tokenizer is `tokenizer`, or the one in the adapter's folder, or this model's.

    Raises:
        InputError: if the adapter is not there, is damaged, belongs to another base, or cannot be
            merged; if its tokenizer has tokens that the model has no embeddings for; or if the
            model was loaded with `fold_norms=True`.
    """
    folder = find_folder(
        adapter, ADAPTER_FILES, revision=revision, token=token, local_files_only=local_files_only
    )
    merged = read_adapter(folder)
    own = _choose_tokenizer(tokenizer, folder, merged.d_vocab(model.cfg.d_vocab))
    return _adapted(model, merged, own or model.tokenizer)


def _choose_tokenizer(
    given: PreTrainedTokenizerBase | None, adapter: Path | None, d_vocab: int
) -> PreTrainedTokenizerBase | None:
    """The tokenizer given, or the one in the adapter's folder; None if the base's is meant."""
    if given is not None:
        fit_to_vocabulary(given, d_vocab, "The tokenizer given")
        return given
    own = None if adapter is None else read_adapter_tokenizer(adapter)
    if own is not None:
        fit_to_vocabulary(own, d_vocab, f"The tokenizer in {adapter}")
    return own


def _adapted(
    model: HookedTransformer, adapter: Adapter, tokenizer: PreTrainedTokenizerBase | None
) -> HookedTransformer:
    if model.cfg.normalization_type != "RMS":
        raise InputError(
            "The weights of the model's norms are folded into matrices that an adapter changes; "
            "give the adapter to load_model, together with fold_norms=True."
        )
    cfg = copy.deepcopy(model.cfg)
    cfg.d_vocab = adapter.d_vocab(cfg.d_vocab)
    # Left out, TransformerLens makes it the other's.
    cfg.d_vocab_out = cfg.d_vocab
    other = empty(cfg)
    share_weights(other, model, adapter)
    share_buffers(other, model)
    return _finished(other, tokenizer)


def _check_foldable(backend: str, dtype: torch.dtype) -> None:
    if backend == "bridge":
        raise InputError(
            "A TransformerBridge runs Hugging Face's own modules, whose norms have weights, so "
            'fold_norms=True is for backend="hooked".'
        )
    if dtype not in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"In {name} the products that fold_norms=True makes would be rounded, and the logits "
            "be others; load the model in float32 or float64."
        )


def find_checkpoint(
    name_or_path: str | Path | nn.Module, gguf_file: str | None, **access: Any
) -> Checkpoint:
    """The checkpoint that is meant: of a model in memory, a GGUF file, a folder, or the hub.

    Raises:
        InputError: if it is not there or is not whole.
    """
    if isinstance(name_or_path, nn.Module):
        if gguf_file is not None:
            raise InputError("gguf_file= is for a folder or hub id, not for a model in memory.")
        return memory_checkpoint(name_or_path)
    file = _gguf(name_or_path, gguf_file, **access)
    if file is not None:
        return gguf_checkpoint(file)
    return folder_checkpoint(find_folder(name_or_path, MODEL_FILES, **access))


def _gguf(name_or_path: str | Path, gguf_file: str | None, **access: Any) -> Path | None:
    """The GGUF file that is meant, if one is."""
    if gguf_file is not None:
        folder = find_folder(name_or_path, [*TOKENIZER_FILES, gguf_file], **access)
        return folder / gguf_file
    local = locate(name_or_path)
    on_hub = gguf_on_hub(name_or_path) if local is None else None
    if on_hub is not None:
        return _gguf(*on_hub, **access)
    return local if local is not None and local.suffix == ".gguf" and local.is_file() else None


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise InputError(f"dtype {dtype} is none of {', '.join(DTYPES)}.")


def usable_device(device: str | torch.device | None, n_devices: int) -> str:
    """The device that is meant, by default CUDA where there is one.

    Raises:
        InputError: if it can't be used, or there are not so many from it on.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(str(device))
    there = torch.cuda.device_count() - (torch.device(device).index or 0)
    if n_devices < 1 or (n_devices > 1 and torch.device(device).type != "cuda"):
        raise InputError(f"n_devices={n_devices} can't be used with the device {str(device)!r}.")
    if n_devices > 1 and n_devices > there:
        raise InputError(f"There are not {n_devices} CUDA devices from {str(device)!r} on.")
    return str(device)


def _finished(
    model: HookedTransformer, tokenizer: PreTrainedTokenizerBase | None
) -> HookedTransformer:
    model.eval()
    if tokenizer is not None:
        # Set directly: set_tokenizer would load another by name, with a BOS of its own choosing.
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = prepends_bos(tokenizer)
        model.cfg.default_prepend_bos = model.cfg.tokenizer_prepends_bos
    return model
