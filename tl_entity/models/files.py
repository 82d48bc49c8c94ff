"""Files that somebody else wrote: JSON, and tensors that are mapped rather than copied.

Nothing here runs code from a file: pickles are read with `weights_only`, and an index can name only
files of its own folder.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.reading import read_json

LONGEST = 240
"""Characters of a library's message that are passed on."""


def reason(error: BaseException) -> str:
    """A library's message as part of a sentence: its first line, or two if that only announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rpartition(' ')[0]} ..."


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files of a checkpoint's weights: a single one, or those that its index names.

    Safetensors come before pickles (`pytorch_model*.bin`) where a folder has both.

    Raises:
        InputError: if there are none, or the index is damaged or names one that is missing.
    """
    for name in (f"{stem}.safetensors", f"pytorch_{stem}.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
    for pattern in (f"{stem}-*.safetensors", "*.safetensors", f"pytorch_{stem}-*.bin"):
        files = [file for file in folder.glob(pattern) if not file.name.startswith("adapter_")]
        # A pipe that goes by such a name would keep the reader waiting for ever.
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is no plain file, so no weights can be read from it.")
        if files:
            return sorted(files)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter and no whole model; give it as adapter= with its base."
        )
    if any(folder.glob("*.gguf")):
        raise InputError(f"{folder} holds GGUF files; say which one with gguf_file=.")
    raise InputError(
        f"{folder} holds no *.safetensors or pytorch_model*.bin weights, the kinds that are read."
    )


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file or a `.bin` pickle, mapped into memory.

    A pickle in PyTorch's format before 1.6 can't be mapped and is read whole.

    Raises:
        InputError: if the file is damaged, or a pickle holds anything but tensors by name.
    """
    try:
        if file.suffix == ".bin":
            yield from _unpickled(file).items()
            return
        with safe_open(file, framework="pt", device="cpu") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                yield key, opened.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or no safetensors file: {error}.") from None
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror or error}.") from None


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except pickle.UnpicklingError as error:
        # The message goes on to advise that the protection be switched off.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" (it asks for {found[1]})" if found else ""
        raise InputError(
            f"{file} is damaged or holds more than tensors{what}; of pickles only tensors are read."
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any of its instructions
        raise InputError(f"{file} is damaged or no PyTorch file: {reason(error)}.") from None
    # Some trainers save the tensors one level down.
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{file} holds other things than tensors by name.")
    for key, value in content.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise InputError(f"{file}: {key} is no plain tensor with its numbers in the file.")
    return content


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name for name in weight_map.values()
    ):
        raise InputError(f"{index} is no index of shards.")
    files = []
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        # An index from elsewhere must not reach outside its folder, nor name another kind of file.
        if Path(name).name != name or not file.is_file():
            raise InputError(f"{index} names {name}, which is not in {index.parent}.")
        if not name.endswith((".safetensors", ".bin")):
            raise InputError(f"{index} names {name}, which is no file of weights.")
        files.append(file)
    if not files:
        raise InputError(f"{index} names no shards.")
    return files
