"""Writing to folders of the user's, whole or not at all."""

from pathlib import Path
from tempfile import NamedTemporaryFile

from tl_entity.errors import InputError


def check_writable(folder: Path) -> None:
    """Make sure that the folder can be made and written to, without making it.

    Raises:
        InputError: if it can't.
    """
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file, so nothing can be written to {folder}.")
    try:
        with NamedTemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"Nothing can be written to {folder}: {error.strerror}.") from None


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that, whatever happens, it is there whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
