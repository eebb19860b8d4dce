"""Files on disks as people have them: full, without locks, without sync, without modes."""

import errno
import os
import socket
import sys
from pathlib import Path

import pytest

import checkpoint
import data
from images import folders
from report import results
from util import files, runstate
from util.runtime import UserError


def failing(monkeypatch, module, name, number, fails=lambda *args: True):
    """Let a function of the system fail with an error's number, where `fails` says so of its arguments."""
    function = getattr(module, name)

    def fail(*args, **options):
        if fails(*args):
            raise OSError(number, os.strerror(number), str(args[0]))
        return function(*args, **options)

    monkeypatch.setattr(module, name, fail)


def write(path, content=b"new"):
    with files.replacing(path) as file:
        file.write(content)


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_replaces_none(tmp_path, monkeypatch, links):
    """Nor one that another process writes at the same time, with hard links or without."""
    if not links:
        failing(monkeypatch, files.os, "link", errno.EPERM)
    path = tmp_path / "a"
    with files.replacing(path, new=True) as file:
        file.write(b"first")
    with pytest.raises(UserError, match="a: File exists"), files.replacing(path, new=True) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def is_folder(handle, *rest):
    return os.path.isdir(f"/proc/self/fd/{handle}" if isinstance(handle, int) else handle)


@pytest.mark.parametrize(
    "name, number, fails",
    [
        *[("fsync", number, is_folder) for number in (errno.EINVAL, errno.ENOSYS, errno.EACCES, errno.EIO)],
        *[("fsync", number, lambda handle: True) for number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)],
        *[("open", number, is_folder) for number in (errno.EACCES, errno.EINVAL, errno.EISDIR)],
        *[("chmod", number, lambda *args: True) for number in (errno.EPERM, errno.ENOTSUP, errno.EACCES)],
    ],
)
def test_what_a_file_system_lacks_costs_no_file(tmp_path, monkeypatch, name, number, fails):
    """A folder that can't be synced or opened, a file that can't be, a mode that can't be changed."""
    (tmp_path / "a").write_bytes(b"old")
    failing(monkeypatch, files.os, name, number, fails)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "name, number, words",
    [
        ("fsync", errno.ENOSPC, r"No space left on device \(\S+ MB are free\)"),
        ("fsync", errno.EDQUOT, "(Disk q|Q)uota exceeded"),
        ("fsync", errno.EIO, "Input/output error"),
        ("fsync", errno.EROFS, "Read-only file system"),
        ("replace", errno.EPERM, "Operation not permitted"),
        ("replace", errno.EROFS, "Read-only file system"),
        ("replace", errno.ESTALE, "[Ss]tale"),
    ],
)
def test_what_keeps_a_file_from_being_written_is_one_line(tmp_path, monkeypatch, name, number, words):
    (tmp_path / "a").write_bytes(b"old")
    failing(monkeypatch, files.os, name, number)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a: {words}.*; what was there is as it was") as raised:
        write(tmp_path / "a")
    assert "\n" not in str(raised.value)
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_name_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        write(tmp_path / ("a" * 300))
    with pytest.raises(UserError, match="--checkpoint_dir"):
        files.ensure_writable(tmp_path / ("a" * 300), "--checkpoint_dir")
    with pytest.raises(UserError, match="File name too long"), files.locked(tmp_path / ("a" * 300)):
        pass


def test_a_folder_that_is_gone_is_made_anew(tmp_path):
    write(tmp_path / "gone" / "too" / "a")
    assert (tmp_path / "gone" / "too" / "a").read_bytes() == b"new"


def test_leftovers_of_this_file_alone_go(tmp_path):
    for name in (".a[1].pth.x.tmp", ".a1.pth.x.tmp"):
        (tmp_path / name).write_bytes(b"half")
    files.remove_leftovers(tmp_path / "a[1].pth")
    assert os.listdir(tmp_path) == [".a1.pth.x.tmp"]


# locks


@pytest.fixture(autouse=True)
def not_yet_said():
    files._say_unlocked.cache_clear()


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EIO])
def test_without_locks_it_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys, number, wait):
    failing(monkeypatch, files.fcntl, "lockf", number)
    done = []
    for _ in range(2):
        with files.locked(tmp_path / "lock", wait):
            done.append(1)
    err = capsys.readouterr().err
    assert len(done) == 2 and err.count("no file locks here") == 1 and err.count("\n") == 1
    assert not (tmp_path / "lock").exists()


def test_without_fcntl_it_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    with files.locked(tmp_path / "lock"):
        assert "no file locks here" in capsys.readouterr().err


def test_a_file_that_is_never_the_same_twice(tmp_path, monkeypatch, capsys):
    """As on file systems that make up the numbers of files."""
    monkeypatch.setattr(files.os.path, "samestat", lambda a, b: False)
    with files.locked(tmp_path / "lock", wait=True):
        assert "no file locks here" in capsys.readouterr().err


def test_a_full_disk_locks_too(tmp_path, monkeypatch):
    failing(monkeypatch, files.os, "write", errno.ENOSPC)
    with files.locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


def test_a_lock_whose_folder_is_gone_is_let_go_of(tmp_path):
    (tmp_path / "folder").mkdir()
    with files.locked(tmp_path / "folder" / "lock"):
        (tmp_path / "folder" / "lock").unlink()
        (tmp_path / "folder").rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_is_held_says_who_holds_it(tmp_path, monkeypatch, number):
    (tmp_path / "lock").write_text("process 7 on there")
    failing(monkeypatch, files.fcntl, "lockf", number)
    with pytest.raises(files.Locked, match="process 7 on there"), files.locked(tmp_path / "lock"):
        pass
    assert Path(tmp_path / "lock").read_text() == "process 7 on there"


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


READERS = {
    "x.pth": lambda path: checkpoint.read(path, ""),
    "x_seed0.json": results.Result.read,
    "x.state": runstate.load,
    "x.png": lambda path: folders.read_image(path, 8),
    "x.csv": lambda path: data.load("csv", path.parent),
    "train-0.parquet": lambda path: data.load("parquet", path.parent),
}


@pytest.mark.parametrize("make", [a_pipe, a_socket, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused(tmp_path, monkeypatch, name, make):
    """It neither hangs nor fills the memory."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path(name))
    with pytest.raises(UserError, match=name):
        READERS[name](tmp_path / name)
