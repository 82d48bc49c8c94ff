"""LoRA adapters: read from a folder that peft wrote, and merged into a base's weights as they
stream by.

LoRA (Hu et al. 2021, arXiv 2106.09685), rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)
and DoRA (Liu et al. 2024, arXiv 2402.09353).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.finite import check_finite
from tl_entity.models.files import read_json, read_tensors

# How tensors are named: the module, what it is, maybe the adapter's name, maybe a leaf.
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.(?!(weight|bias)$)[^.]+)?(\.(?P<leaf>weight|bias))?"
)
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.(?!(weight|bias)$)[^.]+)?)(?=\.)")
_PREFIX = "base_model.model."

_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",  # names classes to import; nothing here imports them
    "base_model_name_or_path",
    "bias",
    "enable_lora",
    "ephemeral_gpu_offload",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # peft itself sets it aside for linear layers
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
"""The settings that are understood, or that change nothing once training is over."""

_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "orthogonal")
"""Initialisations after which the adapter belongs to a changed copy of its base."""


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to one matrix: `scale * b @ a`, or its transpose for an embedding.

    Attributes:
        a: [rank, in]; for an embedding [rank, d_vocab].
        b: [out, rank]; for an embedding [d_model, rank].
        scale: alpha over the rank, or over its root.
        magnitude: [out], the length of each row after the merge (DoRA); None for plain LoRA.
        is_embedding: whether the matrix holds a row a token.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix that it belongs to."""
        rows, columns = len(self.b), self.a.shape[1]
        return (columns, rows) if self.is_embedding else (rows, columns)

    def merged(self, weight: Tensor) -> Tensor:
        """The changed matrix, in float32 at least; `weight` itself stays as it is."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(weight.device, dtype) for factor in (self.a, self.b))
        left, right = (a.T, b.T) if self.is_embedding else (b, a)
        merged = weight.to(dtype, copy=True).addmm_(left, right, alpha=self.scale)
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(merged, dim=1)
            merged *= (self.magnitude.to(weight.device, dtype) / lengths)[:, None]
        return merged


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        place: its folder, for messages.
        low_rank: by name of the weight it changes, in Hugging Face's names.
        replaced: tensors that take the place of the base's (`modules_to_save`, trained biases).
        targets: `target_modules` of its configuration.
        in_all_layers: whether it should be found in every module that `targets` names.
    """

    place: str
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]
    targets: list[str] | str | None = None
    in_all_layers: bool = True

    @property
    def changes(self) -> set[str]:
        """The names of the weights that it changes."""
        return {*self.low_rank, *self.replaced}

    def applied(self, key: str, tensor: Tensor) -> Tensor:
        """The tensor of this name with the adapter merged: the same one if it is not concerned.

        Raises:
            InputError: if the adapter was made for another shape.
            NotFiniteError: if the merged tensor is NaN or infinite.
        """
        for change in (self.replaced.get(key), self.low_rank.get(key)):
            if change is None:
                continue
            if tuple(change.shape) != tuple(tensor.shape):
                raise InputError(
                    f"{self.place} was trained on another base: its {key} has shape "
                    f"{tuple(change.shape)}, the base's {tuple(tensor.shape)}."
                )
            tensor = change.merged(tensor) if isinstance(change, LowRank) else change
            check_finite(
                f"{self.place}: {key} merged", tensor, "the adapter or its scaling is damaged"
            )
        return tensor

    def check_used(self, keys: set[str], base: str) -> None:
        """Make sure that the base has all that the adapter changes, and the adapter all it names.

        Args:
            keys: names of the base's weights.
            base: names the base in messages.

        Raises:
            InputError: naming a weight that only one of the two has.
        """
        unused = sorted(self.changes - keys)
        if unused:
            raise InputError(
                f"{self.place} was trained on another base: it changes {unused[0]}, "
                f"which {base} does not have."
            )
        if not self.in_all_layers:
            return
        for key in sorted(keys - self.changes):
            if key.endswith("proj.weight") and self._targets(key.removesuffix(".weight")):
                raise InputError(
                    f"{self.place} has no LoRA weights for {key.removesuffix('.weight')}, which "
                    "its target_modules name; it is incomplete or was trained on another base."
                )

    def _targets(self, module: str) -> bool:
        match self.targets:
            case "all-linear":
                return True
            case str() as pattern:
                return re.fullmatch(pattern, module) is not None
            case list() as names:
                return any(module == name or module.endswith(f".{name}") for name in names)
            case _:
                return False


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
    _refuse_what_differs(file, config)
    weights = _weights_file(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in read_tensors(weights):
        if not tensor.is_floating_point():
            raise InputError(f"{weights}: {name} holds no floating-point numbers.")
        check_finite(
            f"{weights}: {name}", tensor, "the file is damaged, or its training went astray"
        )
        key = name.removeprefix(_PREFIX)
        found = _LOW_RANK.fullmatch(key)
        if found is None:
            key, known = _WRAPPER.sub("", key), replaced
        else:
            if found["leaf"] == "bias":
                raise InputError(f"{weights}: {name} is a bias of LoRA itself; merge it with peft.")
            known = parts.setdefault(f"{found['module']}.weight", {})
            key = found["part"]
        if key in known:
            raise InputError(f"{weights} holds {name} twice, for two adapters.")
        known[key] = tensor
    if not parts:
        raise InputError(f"{weights} holds no LoRA weights.")
    low_rank = {key: _low_rank(weights, key, given, config) for key, given in parts.items()}
    return Adapter(
        place=str(folder),
        low_rank=low_rank,
        replaced=replaced,
        targets=config.get("target_modules"),
        in_all_layers=not config.get("layers_to_transform") and not config.get("exclude_modules"),
    )


def _refuse_what_differs(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{file} is of an adapter of type {kind!r}, and only LORA is merged here; merge it "
            "with peft, if that can, and give the merged folder."
        )
    for name, value in config.items():
        if value and name not in _HARMLESS and value != {}:
            raise InputError(
                f"{file} sets {name}, which is not supported; merge the adapter with peft and give "
                "the merged folder."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise InputError(
            f"{file} has init_lora_weights {start!r}, which changed the base before training; "
            "merge the adapter with peft and give the merged folder."
        )
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{file} has {name} {patterns!r}; it must be an object.")
        numbers |= {f"{name} for {pattern}": value for pattern, value in patterns.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise InputError(f"{file} has {name} {value!r}; it must be a positive number.")
        if value > torch.finfo(torch.float32).max:
            raise InputError(f"{file} has a {name} that is too large for float32.")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name) or False, bool):
            raise InputError(f"{file} has {name} {config[name]!r}; it must be true or false.")
    targets = config.get("target_modules")
    if targets is not None and not (
        isinstance(targets, str)
        or (isinstance(targets, list) and all(isinstance(name, str) for name in targets))
    ):
        raise InputError(f"{file} has target_modules {targets!r}; it must be a list of names.")
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for pattern in [*patterns, *([targets] if isinstance(targets, str) else [])]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{file} has the pattern {pattern!r}: {error}.") from None


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
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    if len(a) != rank:
        raise InputError(
            f"{file}: the factors for {module} are of rank {len(a)}, but adapter_config.json says "
            f"{rank}."
        )
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
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


def _by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    # As peft reads them: a pattern stands for the end of a module's name, from a dot on.
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
