"""Files, written so that only whole ones take the place of others."""

import contextlib
import errno
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from util.runtime import UserError, say

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes `path`'s place only once it is whole and on the disk; until then, `path` stays.

    Raises UserError where the disk is full or the folder can't be written. What only makes it last through a power cut,
    or sets its mode, is done where the file system can.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        with contextlib.suppress(OSError):  # a file system of no modes, or of another owner's
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there is as it was") from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):  # moved to its place; or its folder is gone
                os.unlink(temporary)


@contextmanager
def replacing_all(paths: list[Path]) -> Iterator[list[BinaryIO]]:
    """`replacing` for several files at once: each takes its place only when all are written."""
    with ExitStack() as stack:
        yield [stack.enter_context(replacing(path)) for path in paths]


def remove_leftovers(path: Path) -> None:
    """Remove what `replacing` could not, as its process was killed; only for who knows that no other writes `path`."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


class Locked(Exception):
    """Another process holds the lock; says which."""


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock that this file is. It goes with its process, however that ends.

    wait: for whoever holds it; else Locked is raised. Raises UserError where the file can't be written.
    """
    if fcntl is None:
        yield
        return
    handle = _lock(path, wait)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # its folder is gone, or read-only by now
            path.unlink(missing_ok=True)  # before letting go of it: see _lock
        os.close(handle)


def _lock(path: Path, wait: bool) -> int:
    """The lock's file, open and locked."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            # lockf, as its locks, unlike those of flock, are not kept alive by worker processes that outlive this one.
            # (So not the package filelock: it uses flock, and where that is missing a file that a killed process
            # leaves behind as a lock for ever.)
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except (BlockingIOError, PermissionError):  # as the system says it
            holder = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise Locked(holder or "another process") from None
        except OSError as error:  # ENOLCK, ENOSYS and others of network and user-space file systems
            say(f"going on without a lock: {path.parent} has none ({error.strerror}); start no second run of this one")
            return handle
        os.close(handle)  # its holder removed it meanwhile: it locks nothing any more


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power cut, where that can be had."""
    if os.name == "posix":
        with contextlib.suppress(OSError):  # network and user-space file systems may not open, or sync, a folder
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _sync(handle: int) -> None:
    """fsync, where the file system has it; a full disk is still told of."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def ensure_writable(folder: Path, flag: str) -> None:
    """Make the folder and write to it once, so that a run fails before its training, not after. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another {flag}") from error


def write_json(value: dict, path: Path) -> None:
    """Write the file atomically. Raises UserError as `replacing` does."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
