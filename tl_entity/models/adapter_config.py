"""What an adapter's configuration says, and which of it merging can represent."""

import re
from pathlib import Path
from typing import Any

import regex
import torch

from tl_entity.errors import InputError

_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",  # names classes to import; nothing here imports them
    "base_model_name_or_path",
    "bias",
    "enable_lora",
    "ensure_weight_tying",
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
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
"""The settings that are understood, or that change nothing once training is over."""

SECONDS_A_MATCH = 0.2
"""A name of a module is matched in microseconds, except by patterns that go back and forth for
ever."""

_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "orthogonal")
"""Initialisations after which the adapter belongs to a changed copy of its base."""


def check_adapter_config(file: Path, config: dict[str, Any]) -> None:
    """Make sure that the settings of this file are understood, and what they should be.

    Raises:
        InputError: naming one that is not, or that merging can't represent.
    """
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
        # A scale is alpha over the rank, which a tiny rank would make infinite.
        if not name.startswith(("lora_alpha", "alpha_pattern")) and value < 1:
            raise InputError(f"{file} has {name} {value!r}; a rank is at least 1.")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name) or False, bool):
            raise InputError(f"{file} has {name} {config[name]!r}; it must be true or false.")
    tokens = config.get("trainable_token_indices")
    for some in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
        if not isinstance(some, list) or not all(type(token) is int for token in some):
            raise InputError(
                f"{file} has trainable_token_indices {tokens!r}; it must hold lists of tokens."
            )
    modules = config.get("modules_to_save")
    if modules is not None and not (
        isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    ):
        raise InputError(f"{file} has modules_to_save {modules!r}; it must be a list of names.")
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
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{file} has the pattern {pattern!r:.100}: {error}.") from None


def by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """The number that `rank_pattern` or `alpha_pattern` has for a module."""
    # As peft reads them: a pattern stands for the end of a module's name, from a dot on.
    for pattern, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({pattern})", module):
            return value
    return default


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern of an adapter's configuration stands for a module.

    Raises:
        InputError: if that takes too long to find out.
    """
    try:
        return regex.fullmatch(pattern, module, timeout=SECONDS_A_MATCH) is not None
    except (TimeoutError, regex.error, MemoryError) as error:
        why = "takes for ever" if isinstance(error, TimeoutError) else str(error)
        raise InputError(
            f"The adapter's pattern {pattern!r:.100} can't be matched with {module}: {why}; "
            "name the modules in a list."
        ) from None
