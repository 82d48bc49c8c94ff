"""Writing to folders of the user's: whole or not at all, and by one process at a time."""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from tl_entity.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where no folder is locked
    fcntl = None

LOCK = ".lock"
"""The file in a folder that says who works in it."""

SECONDS_BETWEEN_LOOKS = 0.5
"""How often a process that waits for a folder looks whether it is free."""

_UNFINISHED = re.compile(r"\.(\d+)-[0-9a-f]{16}\.part")
"""Names of files that are being written: the process, and what makes the name unique."""


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Said by file systems that know no locks."""


def check_writable(folder: Path) -> None:
    """Make sure that the folder can be made and written to, without making it.

    Raises:
        InputError: if it can't.
    """
    if "\0" in str(folder):
        raise InputError(f"{str(folder)!r} can be no folder: its name has a NUL character in it.")
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


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that, whatever happens, it is there whole or not at all.

    The content goes to a new file beside it, which then takes its name. Nothing is written through
    a link, and no two processes write to one file.

    Raises:
        InputError: if it can't be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    part = unfinished(path)
    try:
        _write_new(part, data)
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} can't be written: {reason}.") from None
    finally:
        with suppress(OSError, ValueError):
            part.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where to write what is to be at a path once it is whole: a name that no other process has."""
    return path.parent / f".{os.getpid()}-{secrets.token_hex(8)}.part"


@contextmanager
def sole_worker(
    folder: Path, *, wait: bool = False, say: Callable[[str], object] = lambda message: None
) -> Generator[None, None, None]:
    """Within this context no other process that asks for the folder gets it.

    The folder is made if it is not there, and removed again if nothing was put into it. What a
    killed process left half written is removed first. A lock ends with its process, however that
    ends.

    Args:
        folder: the folder.
        wait: wait for a process that has it, instead of giving up.
        say: told whom it waits for.

    Raises:
        InputError: if another process has the folder, or the folder can't be made.
    """
    check_writable(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock: int | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, wait, say)
        _remove_unfinished(folder)
        yield
    finally:
        if lock is not None:
            # Removed while it is held: nobody else can hold a file of this name yet.
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _write_new(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the name on the disk too, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(folder: Path, wait: bool, say: Callable[[str], object]) -> int | None:
    """The open lock file of a folder; None where folders can't be locked."""
    told = False
    while True:
        try:
            lock = _try_lock(folder / LOCK)
        except BlockingIOError:
            at_work = f"{_holder(folder / LOCK)} is at work in {folder}"
            if not wait:
                raise InputError(f"{at_work}; let it end first, or give another folder.") from None
            if not told:
                say(f"{at_work}; waiting for it to end.")
                told = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise InputError(f"{folder / LOCK} can't be locked: {error.strerror}.") from None
        else:
            return lock


def _try_lock(path: Path) -> int | None:
    """Open and lock a file.

    Raises:
        BlockingIOError: if another process has it.
    """
    if fcntl is None:
        return None
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path, flags, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have removed it since it was opened: then it is no longer this name's.
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                os.ftruncate(lock, 0)
                os.write(lock, f"{os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _holder(lock: Path) -> str:
    """Who has a lock, and since when."""
    try:
        process, since = lock.read_text(encoding="utf-8").split(" ", 1)
    except (OSError, ValueError):
        return "Another process"
    return f"Process {process}, since {since},"


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that are no more have left half written."""
    for path in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        named = _UNFINISHED.fullmatch(path.name)
        if named is None or _is_alive(int(named[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
