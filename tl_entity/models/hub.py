"""From a name, a path or a hub id to a local folder. The hub is asked for data alone."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tl_entity.errors import InputError
from tl_entity.models.files import reason
from tl_entity.models.registry import hub_id, locate

TOKENIZER_FILES: list[str] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
"""What a tokenizer is read from."""

MODEL_FILES: list[str] = [
    *TOKENIZER_FILES,
    "model*.safetensors",
    "model.safetensors.index.json",
]
"""All that is fetched of a model's repository at first: no code, no pickles."""

ADAPTER_FILES: list[str] = [*TOKENIZER_FILES, "adapter_config.json", "adapter_model.safetensors"]
"""All that is fetched of an adapter's repository at first; some hold a tokenizer."""

PICKLES: list[str] = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"]
"""Fetched only where a repository has no safetensors; read with `weights_only`."""


def find_folder(
    name_or_path: str | Path,
    files: list[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a registered name or a path, or the hub's files of these patterns in its cache.

    Offline mode (`HF_HUB_OFFLINE`) and the environment's token are the hub client's business.

    Raises:
        InputError: if it is nowhere to be had.
    """
    local = locate(name_or_path)
    if local is not None:
        if not local.is_dir():
            raise InputError(f"{local} is a file; give the checkpoint's folder.")
        if revision is not None:
            raise InputError(
                f"{local} is a folder here, of which there are no revisions; leave out "
                f"{revision!r}, or give a hub id."
            )
        return local
    name = hub_id(name_or_path)

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )

    try:
        folder = fetch(files)
        has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        if any(pattern.endswith("safetensors") for pattern in files) and not has_weights:
            folder = fetch([*files, *PICKLES])
    except Exception as error:  # the hub client raises many kinds, network errors among them
        raise InputError(
            f"There is no folder {name}, and it can't be had from the hub: "
            f"{_why_not(error, name, revision)}"
        ) from None
    return folder


def _why_not(error: Exception, name: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated; accept its licence at https://huggingface.co/{name} and set HF_TOKEN "
            "to a token of that account."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and HF_TOKEN gives no access."
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the hub's cache, and the hub is offline or out of reach."
    return reason(error)
