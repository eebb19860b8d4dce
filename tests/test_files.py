"""Files and locks on machines as people have them."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from util import files
from util.runtime import UserError


def failing(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def write(path, content=b"new"):
    with files.replacing(path) as file:
        file.write(content)


@pytest.mark.parametrize("call, number", [("chmod", errno.EPERM), ("fsync", errno.EINVAL), ("fsync", errno.ENOSYS)])
def test_what_a_file_system_cannot_do_costs_no_file(tmp_path, monkeypatch, call, number):
    monkeypatch.setattr(os, call, failing(number))
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    real = os.open

    def open_(path, flags, *mode, **options):
        if os.path.isdir(path):
            raise OSError(errno.EACCES, "Permission denied")
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", open_)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told(tmp_path, monkeypatch, number):
    write(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(UserError, match="cannot write .*/a: .*; what was there is as it was"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, number, capfd):
    monkeypatch.setattr(files.fcntl, "lockf", failing(number))
    files._say_unlocked.cache_clear()
    with files.locked(tmp_path / "lock"):
        write(tmp_path / "a")
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "going on without" in told[0]
    assert os.listdir(tmp_path) == ["a"]


def test_lines_outlive_their_readers():
    """Of figures on stdout, as with `| head -1`, and of notes on stderr, as when a terminal is gone."""
    program = """
        import os, sys
        from util.runtime import lasting_output, say
        for number in (1, 2):
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, number)
        with lasting_output():
            for _ in range(3):
                print("figures", flush=True)
                say("a note")
                sys.stderr.write("a bar")
        os.write(int(sys.argv[1]), b"reached the end")
    """
    read, write_ = os.pipe()
    command = [sys.executable, "-c", textwrap.dedent(program), str(write_)]
    assert subprocess.run(command, cwd=ROOT, pass_fds=[write_], timeout=60).returncode in (0, 120)
    os.close(write_)
    assert os.read(read, 100) == b"reached the end"
