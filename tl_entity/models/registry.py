"""Names for models, and where the data that ships is found. Needs no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from tl_entity.errors import InputError, did_you_mean

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

PLANTED_FILE = "planted.json"
"""Beside a checkpoint whose circuit was planted: that circuit."""


@dataclass(frozen=True)
class RegisteredModel:
    """A model that can be loaded by name: one that ships, or one on the Hugging Face hub.

    Attributes:
        name: what `load_model` is given.
        note: what it is, in a line.
        parameters: how many numbers it has, tied embeddings counted once.
        licence: of the weights; the model's card has the last word.
        folder: its checkpoint, within the data that ships.
        hub_id: its repository on the hub.
        adapter: the repository of a LoRA adapter that is merged into it.
    """

    name: str
    note: str
    parameters: int
    licence: str
    folder: str | None = None
    hub_id: str | None = None
    adapter: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, for people to read."""
        parts = (self.hub_id or "ships with tl_entity", self.adapter)
        return " + ".join(part for part in parts if part)

    def bytes(self, bytes_per_number: int = 4) -> int:
        """Memory for the weights; float32 unless another size is given."""
        return self.parameters * bytes_per_number


_LLAMA_1 = "LLaMA, research only"
_LLAMA_3 = "Llama Community"
_7B = 6_738_415_616

REGISTRY: tuple[RegisteredModel, ...] = (
    RegisteredModel(
        "default-base",
        "tiny Llama trained by this project, its entity-tracking circuit planted",
        664_960,
        "MIT",
        folder="default_pair/base",
    ),
    RegisteredModel(
        "default-tuned",
        "the same model fine-tuned by this project",
        664_960,
        "MIT",
        folder="default_pair/tuned",
    ),
    RegisteredModel(
        "llama-7b", "the paper's base model", _7B, _LLAMA_1, hub_id="huggyllama/llama-7b"
    ),
    RegisteredModel(
        "vicuna-7b",
        "the paper's: fine-tuned on conversations",
        _7B,
        _LLAMA_1,
        hub_id="AlekseyKorshuk/vicuna-7b",
    ),
    RegisteredModel(
        "goat-7b",
        "the paper's: fine-tuned on arithmetic, an adapter",
        _7B,
        _LLAMA_1,
        hub_id="huggyllama/llama-7b",
        adapter="tiedong/goat-lora-7b",
    ),
    RegisteredModel(
        "float-7b",
        "the paper's: fully fine-tuned on arithmetic",
        _7B,
        _LLAMA_1,
        hub_id="nikhil07prakash/float-7b",
    ),
    RegisteredModel(
        "smollm2-135m", "small", 134_515_008, "Apache-2.0", hub_id="HuggingFaceTB/SmolLM2-135M"
    ),
    RegisteredModel(
        "smollm2-360m", "small", 361_821_120, "Apache-2.0", hub_id="HuggingFaceTB/SmolLM2-360M"
    ),
    RegisteredModel(
        "smollm2-1.7b", "small", 1_711_376_384, "Apache-2.0", hub_id="HuggingFaceTB/SmolLM2-1.7B"
    ),
    RegisteredModel("qwen2.5-0.5b", "small", 494_032_768, "Apache-2.0", hub_id="Qwen/Qwen2.5-0.5B"),
    RegisteredModel(
        "qwen2.5-coder-0.5b",
        "small, trained on code",
        494_032_768,
        "Apache-2.0",
        hub_id="Qwen/Qwen2.5-Coder-0.5B",
    ),
    RegisteredModel(
        "qwen2.5-1.5b", "small", 1_543_714_304, "Apache-2.0", hub_id="Qwen/Qwen2.5-1.5B"
    ),
    RegisteredModel(
        "qwen3-0.6b", "small", 596_049_920, "Apache-2.0", hub_id="Qwen/Qwen3-0.6B-Base"
    ),
    RegisteredModel(
        "tinyllama-1.1b",
        "small, tuned for conversation",
        1_100_048_384,
        "Apache-2.0",
        hub_id="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
    RegisteredModel(
        "llama-3.2-1b", "small, gated", 1_235_814_400, _LLAMA_3, hub_id="meta-llama/Llama-3.2-1B"
    ),
    RegisteredModel(
        "llama-3.2-3b", "gated", 3_212_749_824, _LLAMA_3, hub_id="meta-llama/Llama-3.2-3B"
    ),
    RegisteredModel(
        "llama-3.1-8b", "gated", 8_030_261_248, _LLAMA_3, hub_id="meta-llama/Llama-3.1-8B"
    ),
    RegisteredModel(
        "mistral-7b-v0.3",
        "gated",
        7_248_023_552,
        "Apache-2.0",
        hub_id="mistralai/Mistral-7B-v0.3",
    ),
)


def registered(name: str | Path) -> RegisteredModel | None:
    """The model of this name; None if there is none, or if a folder goes by the same name."""
    for model in REGISTRY:
        if model.name == str(name) and (model.folder is not None or not Path(name).exists()):
            return model
    return None


def listing() -> list[str]:
    """The registry as the lines of a table, memory in GB (10^9 bytes)."""
    rows = [("name", "parameters", "float32", "bfloat16", "licence", "source")]
    for model in REGISTRY:
        rows.append(
            (
                model.name,
                _millions(model.parameters),
                f"{model.bytes(4) / 1e9:.3g} GB",
                f"{model.bytes(2) / 1e9:.3g} GB",
                model.licence,
                model.source,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 1 <= column <= 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def data_folder() -> Path:
    """The data that ships: `data/` of a checkout, or its copy inside the installed package.

    Raises:
        InputError: if neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / "default_pair").is_dir():
            return folder
    raise InputError("The data that ships with tl_entity is not there; install the package again.")


def locate(name_or_path: str | Path) -> Path | None:
    """The local folder of a model that ships, or a path that exists; None for anything else.

    Raises:
        InputError: if a model that ships is missing.
    """
    model = registered(name_or_path)
    if model is not None and model.folder is not None:
        folder = data_folder() / model.folder
        if not folder.is_dir():
            raise InputError(f"The model {model.name} is not there: {folder} is missing.")
        return folder
    path = Path(name_or_path).expanduser()
    return path if path.exists() else None


def hub_id(name_or_path: str | Path) -> str:
    """The hub's name of a repository: that of a registered model, or the name itself.

    Raises:
        InputError: if it can be no such name, and so must have been meant as a folder.
    """
    model = registered(name_or_path)
    name = str(name_or_path) if model is None or model.hub_id is None else model.hub_id
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name):
        names = [model.name for model in REGISTRY]
        raise InputError(
            f"There is no folder {name}, and it is no hub id (owner/name) and none of "
            f"{', '.join(names)}{did_you_mean(name, names)}"
        )
    return name


def gguf_on_hub(name_or_path: str | Path) -> tuple[str, str] | None:
    """Repository and file that `owner/name/file.gguf` stands for; None for any other name."""
    if isinstance(name_or_path, Path) or not name_or_path.endswith(".gguf"):
        return None
    parts = name_or_path.split("/")
    repository = "/".join(parts[:2])
    if len(parts) < 3 or not _HUB_ID.fullmatch(repository):
        return None
    return repository, "/".join(parts[2:])


def join_gguf(name_or_path: str, file: str) -> str:
    """The one name of a GGUF file in a folder or hub repository."""
    local = locate(name_or_path)
    place = hub_id(name_or_path) if local is None else str(local)
    return f"{place.rstrip('/')}/{file}"


def check_model(name_or_path: str, *, adapter: bool = False) -> None:
    """Make sure that a name can stand for a model, or for an adapter, without reading any of it.

    Raises:
        InputError: if it is no name, no hub id, and nothing of the kind is at this place.
    """
    local = locate(name_or_path)
    if local is None:
        if gguf_on_hub(name_or_path) is None:
            hub_id(name_or_path)
    elif local.is_dir():
        if not adapter:
            check_checkpoint_folder(local)
        elif not (local / "adapter_config.json").is_file():
            raise InputError(f"{local} has no adapter_config.json; is it an adapter's folder?")
    elif adapter or not (local.suffix == ".gguf" and local.is_file()):
        raise InputError(f"{local} is a file; give the checkpoint's folder.")


def check_checkpoint_folder(folder: Path) -> None:
    """Make sure that a folder has a checkpoint's configuration.

    Raises:
        InputError: saying what it is instead.
    """
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} is an adapter, not a whole model; give it as adapter= with its base."
        )
    if any(folder.glob("*.gguf")):
        raise InputError(f"{folder} holds GGUF files; say which one with gguf_file=.")
    raise InputError(f"{folder} has no config.json; is it a checkpoint's folder?")


def public_name(name_or_path: str) -> str:
    """What others may read of a model's name: of a place on this machine that is not below the
    current folder its last part alone, since the rest names people and their folders."""
    path = Path(name_or_path).expanduser()
    if registered(name_or_path) is not None or not (path.is_absolute() or path.exists()):
        return name_or_path
    is_below = not path.is_absolute() and ".." not in path.parts
    return name_or_path if is_below else path.resolve().name


def planted_circuit(name_or_path: str | Path) -> Path | None:
    """The file that says which heads were planted in this model, if they were."""
    folder = locate(name_or_path)
    if folder is None:
        return None
    file = folder / PLANTED_FILE
    return file if file.is_file() else None
