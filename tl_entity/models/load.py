"""`load_model`: from a name, a folder or a hub id to a HookedTransformer with the same numbers."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformer_lens import HookedTransformer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.models.config import hooked_config
from tl_entity.models.registry import REGISTRY, locate
from tl_entity.models.weights import install_weights

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What weights and activations can be held in."""

HUB_FILES: list[str] = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
"""All that is fetched of a hub repository: no code, no pickles."""


@checked
def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    backend: Literal["hooked", "bridge"] = "hooked",
) -> HookedTransformer:
    """A Llama-family checkpoint as a HookedTransformer with the numbers of Hugging Face's model.

    Weights are not folded or centred, and do not require gradients. In the checkpoint's own dtype,
    on the CPU, they are not copied either but views of its memory-mapped files: leave those in
    place while the model lives. A change to a weight stays in memory and never reaches the file.

    The tokenizer is the checkpoint's own, at `model.tokenizer`; `model.to_tokens(text)` gives the
    tokens that it gives, with a beginning-of-sequence token if and only if it puts one.

    Args:
        name_or_path: a name from the registry ("default-base", "default-tuned"), a folder with
            config.json, safetensors and a tokenizer, or a Hugging Face hub id.
        adapter: a LoRA adapter to merge; not supported yet.
        gguf_file: a GGUF file in the folder; not supported yet.
        dtype: of weights and activations: "float32", "float64", "float16", "bfloat16".
        device: such as "cpu" or "cuda:1"; CUDA where there is one if left out.
        backend: "hooked"; "bridge" is not supported yet.

    Raises:
        InputError: if the checkpoint is not there, is damaged, or cannot be represented exactly;
            the message says what and where.
    """
    _refuse_what_comes_later(adapter, gguf_file, backend)
    dtype = _dtype(dtype)
    device = _device(device)
    folder = _folder(name_or_path)
    config = _read_config(folder)
    cfg = hooked_config(config, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    padding: Any = tokenizer.pad_token_id
    if padding is not None and padding >= cfg.d_vocab:
        # Some fine-tunes add a padding token that the embedding has no row for.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Buffers are small and made for real; only parameters wait for the checkpoint's.
        with init_empty_weights(include_buffers=False):
            model = HookedTransformer(cfg, move_to_device=False)
    install_weights(model, folder, config)
    model.to(device, print_details=False)
    _copy_rotary_tables(model, config)
    model.eval()
    # Set directly: set_tokenizer would load another one by name, with a BOS of its own choosing.
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = _prepends_bos(tokenizer)
    return model


@checked
def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, padding on the right.

    Where it has no padding token, its end token stands in (or its unknown token); padding is
    masked, so which one it is changes nothing.

    Raises:
        InputError: if the folder has none that can be read.
    """
    folder = _folder(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds, some of them bare Exception
        raise InputError(f"{folder} has no tokenizer that can be read: {_reason(error)}") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _refuse_what_comes_later(
    adapter: str | Path | None, gguf_file: str | None, backend: str
) -> None:
    if adapter is not None:
        raise InputError(
            "An adapter is not supported yet; merge it into its base and give that folder."
        )
    if gguf_file is not None:
        raise InputError("A GGUF file is not supported yet; convert it to a folder of safetensors.")
    if backend != "hooked":
        raise InputError(f'backend="{backend}" is not supported yet; leave it at "hooked".')


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise InputError(f"dtype {dtype} is none of {', '.join(DTYPES)}.")


def _device(device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {str(device)!r} can't be used: {_reason(error)}") from None
    return str(device)


def _folder(name_or_path: str | Path) -> Path:
    local = locate(name_or_path)
    if local is not None:
        if not local.is_dir():
            raise InputError(f"{local} is a file; give the checkpoint's folder.")
        return local
    name = str(name_or_path)
    parts = name.split("/")
    if isinstance(name_or_path, Path) or len(parts) != 2 or name.startswith((".", "~", "/")):
        names = ", ".join(model.name for model in REGISTRY)
        raise InputError(
            f"There is no folder {name}, and it is no hub id (owner/name) and none of {names}."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds, network errors among them
        raise InputError(
            f"There is no folder {name}, and it can't be had from the hub: {_reason(error)}"
        ) from None


def _read_config(folder: Path) -> PretrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder} is an adapter, not a whole model; merge it into its base.")
        raise InputError(f"{folder} has no config.json; is it a checkpoint's folder?")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not JSON that can be read: {_reason(error)}.") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an unknown model_type and bad values raise different kinds
        raise InputError(
            f"{file} (model_type {kind!r}) is no configuration that can be read: {_reason(error)}"
        ) from None


def _copy_rotary_tables(model: HookedTransformer, config: PretrainedConfig) -> None:
    """Take cos and sin from transformers: angles computed otherwise drift in long prompts.

    All layers share one pair of tables, for all of `n_ctx`: TransformerLens would compute its own
    from the first position beyond.
    """
    # It reads only sizes and rope settings, which all families supported here share.
    settings: Any = config
    rotary = LlamaRotaryEmbedding(config=settings)
    # Angles are float32 in any dtype, as in Hugging Face's own forward.
    cos, sin = rotary(torch.empty(0), torch.arange(model.cfg.n_ctx)[None])
    place = {"device": model.cfg.device, "dtype": model.cfg.dtype}
    cos, sin = cos[0].to(**place), sin[0].to(**place)
    for block in model.blocks:
        attn: Any = block.attn
        attn.rotary_cos = cos
        attn.rotary_sin = sin


def _prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _reason(error: Exception) -> str:
    """A library's message as part of a sentence: its first line, or two if that only announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
