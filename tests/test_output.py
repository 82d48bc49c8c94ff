"""Files are written whole or not at all, and a folder is worked in by one process at a time."""

import multiprocessing
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tl_entity.errors import InputError
from tl_entity.output import LOCK, sole_worker, write_atomically

WRITERS, TIMES = 8, 20

HOLD = """
import sys, time
from pathlib import Path
from tl_entity.output import sole_worker
with sole_worker(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def write_often(path: Path, letter: bytes, start) -> None:
    start.wait()
    for length in range(1, TIMES + 1):
        write_atomically(path, letter * (length * 10_000))


def test_of_several_writers_of_one_file_each_writes_it_whole(tmp_path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(WRITERS)
    letters = [bytes([ord("a") + n]) for n in range(WRITERS)]
    path = tmp_path / "file"
    path.write_bytes(b"a" * 10_000)
    writers = [fork.Process(target=write_often, args=(path, one, start)) for one in letters]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = path.read_bytes()
        assert len(set(found)) == 1 and len(found) % 10_000 == 0
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(path.read_bytes()) == TIMES * 10_000
    assert names(tmp_path) == ["file"]


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "file"
    path.symlink_to(precious)
    write_atomically(path, "new")
    assert precious.read_text() == "mine"
    assert path.read_text() == "new" and not path.is_symlink()
    # Nor where somebody knows the name of the file that is written first.
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n)
    planted = path.with_name(f".{os.getpid()}-{'0' * 16}.part")
    planted.symlink_to(precious)
    with pytest.raises(InputError, match="file can't be written: File exists"):
        write_atomically(path, "newer")
    assert precious.read_text() == "mine" and path.read_text() == "new"


@pytest.mark.parametrize("name", ["folder", "no/such/folder", "a\0b", "\ud800", "n" * 300])
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="can't be written"):
        write_atomically(tmp_path / name, "text")
    assert names(tmp_path) == ["folder"]


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_is_at_work(tmp_path, holder):
    said = f"^Process {holder.pid}, since 20.*, is at work in .*; let it end"
    with pytest.raises(InputError, match=said), sole_worker(tmp_path):
        pass
    # A lock ends with its process, however that ends, and leaves nothing.
    holder.kill()
    holder.wait()
    with sole_worker(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    assert not names(tmp_path)


def test_a_second_process_can_wait(tmp_path, holder):
    told = []

    def let_go(message: str) -> None:
        told.append(message)
        holder.stdin.write("\n")
        holder.stdin.flush()

    with sole_worker(tmp_path, wait=True, say=let_go):
        assert holder.wait() == 0
    assert len(told) == 1 and f"Process {holder.pid}" in told[0] and "waiting" in told[0]


def test_a_folder_that_nothing_was_put_into_is_not_left_behind(tmp_path):
    with pytest.raises(RuntimeError), sole_worker(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not names(tmp_path)
    with sole_worker(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("kept")
    with sole_worker(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path / "a" / "b") == ["file"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"\.lock can't be locked"), sole_worker(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "steps").mkdir()
    half = tmp_path / "steps" / f".{gone.pid}-{'0' * 16}.part"
    written_now = tmp_path / f".{os.getpid()}-{'0' * 16}.part"
    somebodys = tmp_path / ".film.part"
    for path in (half, written_now, somebodys):
        path.write_text("half")
    with sole_worker(tmp_path):
        pass
    assert not half.exists() and written_now.exists() and somebodys.exists()
