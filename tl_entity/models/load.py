"""`load_model`: from a name, a folder or a hub id to a HookedTransformer with the same numbers."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
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
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "token*", "*.model"]
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

    Weights are not folded, centred or copied: they are views of the checkpoint's files, and do not
    require gradients. The tokenizer is the checkpoint's own, at `model.tokenizer`.

    Args:
        name_or_path: a name from the registry ("default-base", "default-tuned"), a folder with
            config.json, safetensors and a tokenizer, or a Hugging Face hub id.
        adapter: not supported yet.
        gguf_file: not supported yet.
        dtype: of weights and activations: "float32", "float64", "float16", "bfloat16".
        device: such as "cpu" or "cuda"; CUDA where there is one if left out.
        backend: only "hooked" so far.

    Raises:
        InputError: if the checkpoint is not there, is damaged, or cannot be represented exactly;
            the message says what and where.
    """
    for name, asked in {
        "adapter": adapter is not None,
        "gguf_file": gguf_file is not None,
        'backend="bridge"': backend == "bridge",
    }.items():
        if asked:
            raise InputError(f"{name} is not supported yet; merge or convert to a plain folder.")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = _folder(name_or_path)
    config = _read_config(folder)
    cfg = hooked_config(config, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Buffers are made for real: they hold the causal mask and rotary tables, not weights.
        with init_empty_weights(include_buffers=False):
            model = HookedTransformer(cfg, move_to_device=False)
    install_weights(
        model, folder, dtype=dtype, device=device, tied=bool(config.tie_word_embeddings)
    )
    _copy_rotary_tables(model, config)
    if torch.device(device).type != "cpu":
        model.to(device)
    model.eval()
    # Set directly: set_tokenizer would load another one by name, with a BOS of its own choosing.
    model.tokenizer = tokenizer
    cfg.tokenizer_prepends_bos = _prepends_bos(tokenizer)
    return model


@checked
def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, padding on the right.

    Where it has no padding token, its end token stands in; padding is always masked.

    Raises:
        InputError: if the folder has none that can be read.
    """
    folder = _folder(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds, some of them bare Exception
        reason = str(error).split("\n")[0]
        raise InputError(f"{folder} has no tokenizer that can be read: {reason}") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _folder(name_or_path: str | Path) -> Path:
    local = locate(name_or_path)
    if local is not None:
        if not local.is_dir():
            raise InputError(f"{local} is a file; give the checkpoint's folder.")
        return local
    name = str(name_or_path)
    parts = name.split("/")
    if isinstance(name_or_path, Path) or len(parts) != 2 or name.startswith((".", "~")):
        names = ", ".join(model.name for model in REGISTRY)
        raise InputError(
            f"There is no folder {name}, and it is no hub id (owner/name) and none of {names}."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds, network errors among them
        reason = str(error).split("\n")[0]
        raise InputError(
            f"There is no folder {name}, and it can't be had from the hub: {reason}"
        ) from None


def _read_config(folder: Path) -> PretrainedConfig:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json; is it a checkpoint's folder?") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}.") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an unknown model_type and bad values raise different kinds
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{file} (model_type {kind!r}) is no configuration that can be read: {reason}"
        ) from None


def _copy_rotary_tables(model: HookedTransformer, config: PretrainedConfig) -> None:
    """Take cos and sin from transformers: angles computed otherwise drift in long prompts.

    All layers share one pair of tables.
    """
    # It reads only sizes and rope settings, which all families supported here share.
    settings: Any = config
    rotary = LlamaRotaryEmbedding(config=settings)
    n_ctx = model.cfg.n_ctx
    positions = torch.arange(n_ctx)[None]
    cos, sin = rotary(torch.empty(0, dtype=torch.float32), positions)
    for block in model.blocks:
        attn: Any = block.attn
        attn.rotary_cos = cos[0].to(model.cfg.dtype)
        attn.rotary_sin = sin[0].to(model.cfg.dtype)


def _prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
