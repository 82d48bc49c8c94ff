"""An adapter's folder, as peft wrote it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.finite import check_finite
from tl_entity.models.adapter import Adapter, LowRank, TokenRows, is_part_of
from tl_entity.models.adapter_config import by_pattern, check_adapter_config
from tl_entity.models.checkpoint import EMBEDDING, UNEMBEDDING
from tl_entity.models.files import read_tensors
from tl_entity.reading import read_json

# How tensors are named: the module, what it is, maybe the adapter's name, maybe a leaf.
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.(?!(weight|bias)$)[^.]+)?(\.(?P<leaf>weight|bias))?"
)
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_SAVED = re.compile(r"\.modules_to_save(\.(?!(weight|bias)$)[^.]+)?(?=\.)")
_BASE = re.compile(r"(\.token_adapter)?\.(base_layer|original_module)(?=\.)")
_PREFIX = "base_model.model."


def read_adapter(folder: Path) -> Adapter:
    """The LoRA adapter in a folder that peft wrote.

    Raises:
        InputError: if there is none, it is damaged, or it does what merging can't represent.
        NotFiniteError: naming the file and the tensor, if a number is NaN or infinite.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no adapter_config.json; is it an adapter's folder?")
    config = read_json(file)
    check_adapter_config(file, config)
    weights = _weights_file(folder)
    found = _read_weights(weights, config.get("modules_to_save") or ())
    if not found.low_rank:
        raise InputError(f"{weights} holds no LoRA weights.")
    return Adapter(
        place=str(folder),
        low_rank={
            key: _low_rank(weights, key, given, config) for key, given in found.low_rank.items()
        },
        replaced=found.replaced,
        base=found.base,
        rows=_token_rows(weights, found.rows, config.get("trainable_token_indices")),
        ties=bool(config.get("ensure_weight_tying")),
        saves=config.get("modules_to_save") or (),
        targets=config.get("target_modules"),
        in_all_layers=not config.get("layers_to_transform") and not config.get("exclude_modules"),
    )


class _Found(NamedTuple):
    """The tensors of an adapter's file by what they are and by name of the weight they change."""

    low_rank: dict[str, dict[str, Tensor]]
    replaced: dict[str, Tensor]
    base: dict[str, Tensor]
    rows: dict[str, Tensor]


def _read_weights(file: Path, modules_to_save: Sequence[str]) -> _Found:
    found = _Found({}, {}, {}, {})
    copies: dict[str, Tensor] = {}
    tensors = dict(read_tensors(file))
    # With save_embedding_layers peft writes what takes the base's place under two names.
    saved = {_SAVED.sub("", key.removeprefix(_PREFIX)) for key in tensors if _SAVED.search(key)}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{file}: {name} holds no floating-point numbers.")
        check_finite(f"{file}: {name}", tensor, "the file is damaged, or its training went astray")
        key = name.removeprefix(_PREFIX)
        if (match := _LOW_RANK.fullmatch(key)) is not None:
            if match["leaf"] == "bias":
                raise InputError(f"{file}: {name} is a bias of LoRA itself; merge it with peft.")
            known = found.low_rank.setdefault(f"{match['module']}.weight", {})
            key = match["part"]
        elif (match := _ROWS.fullmatch(key)) is not None:
            key, known = f"{match['module']}.weight", found.rows
        elif _SAVED.search(key) is not None:
            key, known = _SAVED.sub("", key), copies
        elif _BASE.search(key) is not None:
            key, known = _BASE.sub("", key), found.base
        elif key in saved or any(is_part_of(key, module) for module in modules_to_save):
            known = found.replaced
        else:
            known = found.base
        if key in known:
            raise InputError(f"{file} holds {name} twice, for two adapters.")
        known[key] = tensor
    for key, tensor in copies.items():
        found.replaced.setdefault(key, tensor)
    return found


def _token_rows(file: Path, rows: Mapping[str, Tensor], given: Any) -> dict[str, TokenRows]:
    """The new rows with the tokens that the configuration has for them."""
    # A list is of the embedding.
    named = given if isinstance(given, dict) else {EMBEDDING.removesuffix(".weight"): given or []}
    found: dict[str, TokenRows] = {}
    for key, values in rows.items():
        module = key.removesuffix(".weight")
        tokens = next((some for name, some in named.items() if module.endswith(name)), None)
        if tokens is None and key == UNEMBEDDING and EMBEDDING in rows:
            continue  # tied, and written twice: the embedding's
        if tokens is None or values.ndim != 2 or len(values) != len(tokens):
            raise InputError(
                f"{file} has {len(values)} rows of {key}, and trainable_token_indices names "
                f"{len(tokens or ())} tokens."
            )
        found[key] = TokenRows(tuple(tokens), values)
    for name, tokens in named.items():
        # Of tied embeddings only the embedding's are written.
        there = any(key.removesuffix(".weight").endswith(name) for key in rows)
        if tokens and not there and not (EMBEDDING in rows and name == "lm_head"):
            raise InputError(f"{file} has no rows of {name}, which trainable_token_indices name.")
    return found


def _weights_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds no adapter_model.safetensors and no adapter_model.bin.")


def _low_rank(file: Path, key: str, parts: dict[str, Tensor], config: dict[str, Any]) -> LowRank:
    module = key.removesuffix(".weight")
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in parts:
            raise InputError(f"{file} lacks {name} for {module}.")
    a, b = (parts[name] for name in names)
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise InputError(
            f"{file}: the factors for {module} have shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            "which do not fit each other."
        )
    rank = by_pattern(config.get("rank_pattern"), module, config["r"])
    if len(a) != rank:
        raise InputError(
            f"{file}: the factors for {module} are of rank {len(a)}, but adapter_config.json says "
            f"{rank}."
        )
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        there = "lacks" if magnitude is None else "has"
        raise InputError(
            f"{file} {there} a magnitude vector for {module}, and adapter_config.json says "
            f"use_dora {bool(config.get('use_dora'))}."
        )
    if magnitude is not None and is_embedding:
        raise InputError(
            f"{file} has DoRA on {module}, an embedding, which is not supported; merge the adapter "
            "with peft and give the merged folder."
        )
    if magnitude is not None and magnitude.shape != (len(b),):
        raise InputError(f"{file}: the magnitude vector for {module} does not fit its factors.")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LowRank(a, b, scale, magnitude, is_embedding)
