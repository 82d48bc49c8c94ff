"""Names for models, and where the data that ships is found. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from tl_entity.errors import InputError

PLANTED_FILE = "planted.json"
"""Beside a checkpoint whose circuit was planted: that circuit."""


@dataclass(frozen=True)
class RegisteredModel:
    """A model that can be loaded by name.

    Attributes:
        name: what `load_model` is given.
        folder: its checkpoint, within the data that ships.
        note: what it is, in a line.
    """

    name: str
    folder: str
    note: str


REGISTRY: tuple[RegisteredModel, ...] = (
    RegisteredModel(
        "default-base",
        "default_pair/base",
        "tiny Llama trained by this project, its entity-tracking circuit planted",
    ),
    RegisteredModel(
        "default-tuned",
        "default_pair/tuned",
        "the same model fine-tuned by this project",
    ),
)


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
    """The local folder of a registered name, or a path that exists; None for anything else.

    Raises:
        InputError: if a registered model that ships is missing.
    """
    for model in REGISTRY:
        if model.name == str(name_or_path):
            folder = data_folder() / model.folder
            if not folder.is_dir():
                raise InputError(f"The model {model.name} is not there: {folder} is missing.")
            return folder
    path = Path(name_or_path).expanduser()
    return path if path.exists() else None


def planted_circuit(name_or_path: str | Path) -> Path | None:
    """The file that says which heads were planted in this model, if they were."""
    folder = locate(name_or_path)
    if folder is None:
        return None
    file = folder / PLANTED_FILE
    return file if file.is_file() else None
