"""Files, written so that only whole ones take the place of others."""

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from util.runtime import UserError, say

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # as network and FUSE file systems say it
HELD = {errno.EACCES, errno.EAGAIN}  # another process has the lock, as systems say it


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _umask()  # asked for once, as while it is asked for it is another one, for other threads, too


@contextmanager
def replacing(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write that takes `path`'s place only once it is whole and on the disk; until then, `path` stays.

    new: refuse to replace what lies there by then. A folder that is gone is made anew. Where the file system can't sync
    or can't change a mode, the file is written all the same; it may then not outlive a power cut.
    Raises UserError where the disk is full or the folder can't be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            yield file
            sync(file)
        with suppress(OSError):  # exFAT and CIFS have no modes
            os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp's files are for their owner alone
        if new:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)  # before the free space is looked at
        reason = f"cannot write {path}: {_why(error, path.parent)}"
        raise UserError(f"{reason}; what was there is as it was") from error
    finally:
        _remove(temporary)


def _link(temporary: str, path: Path) -> None:
    """Give the file the name `path`. Raises FileExistsError where that is taken, be it since a moment ago."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.replace(temporary, path)


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk, where the file system can. Raises OSError where the disk can't take it."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power cut, where the system can: the file is in its place already."""
    if os.name == "posix":
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _remove(temporary: str | None) -> None:
    if temporary:
        with suppress(OSError):  # renamed already, or the folder is gone or read-only now
            os.unlink(temporary)


def _why(error: OSError, folder: Path) -> str:
    """The error in words, and what the user needs to know besides."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            reason += f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free)"
    if os.name == "nt" and isinstance(error, PermissionError):
        reason += " (does another program have it open?)"
    return reason


@contextmanager
def replacing_all(paths: list[Path]) -> Iterator[list[BinaryIO]]:
    """`replacing` for several files at once: each takes its place only when all are written."""
    with ExitStack() as stack:
        yield [stack.enter_context(replacing(path)) for path in paths]


def remove_leftovers(path: Path) -> None:
    """Remove what `replacing` could not, as its process was killed; only for who knows that no other writes `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        _remove(leftover)


class Locked(Exception):
    """Another process holds the lock; says which."""


# Not by the filelock package, though torch brings it along: it differs much between its versions. On Unix its lock
# is flock's, which a forked process that outlives its parent can keep. The file doesn't say who holds it, and some
# versions empty it when another process only asks. Where flock is missing (ENOSYS), some raise, and others lock by a
# file's mere presence, which a `kill -9` leaves behind, and another machine can't tell that it did. Where a network
# file system gives no locks (ENOLCK, ENOTSUP), all raise.
@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock that this file is. It goes with its process, however that ends.

    wait: for whoever holds it; else Locked is raised. Where there are no locks, it goes on without, and says so once.
    Raises UserError where the file can't be written.
    """
    handle = _lock(path, wait)
    if handle is None:
        yield
        return
    try:
        with suppress(OSError):  # a full disk: the lock holds without the name, too
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        _remove(path)  # before letting go of it: see _lock
        os.close(handle)


def _lock(path: Path, wait: bool) -> int | None:
    """The lock's file, open and locked; None where there are no locks."""
    if fcntl is None:
        _say_unlocked("this system has none that are known here")
        return None
    for _ in range(100):  # it would never end where a file system gives a file a new number at each look
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {_why(error, path.parent)}") from error
        try:
            # lockf, as its locks, unlike those of flock, are not kept alive by worker processes that outlive this one.
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(path, handle):
                return handle
        except OSError as error:
            if error.errno in HELD:
                holder = os.read(handle, 200).decode(errors="replace")
                os.close(handle)
                raise Locked(holder or "another process") from None
            os.close(handle)
            _remove(path)
            _say_unlocked(error.strerror or str(error))
            return None
        os.close(handle)  # its holder removed it meanwhile: it locks nothing any more
    _say_unlocked("a file is never the same twice")
    return None


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:  # removed
        return False


@cache  # once
def _say_unlocked(reason: str) -> None:
    say(f"no file locks here ({reason}): going on without; take care that no two runs make the same checkpoint")


def ensure_writable(folder: Path, flag: str) -> None:
    """Make the folder and write to it once, so that a run fails before its training, not after. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {_why(error, folder)}; choose another {flag}") from error


def write_json(value: dict, path: Path) -> None:
    """Write the file atomically. Raises UserError as `replacing` does."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sealed(value: dict) -> dict:
    """The value, of JSON's types, with a checksum of all that is in it."""
    return value | {"sha256": _json_sha256(value)}


def unsealed(value: dict) -> dict:
    """What `sealed` was given. Raises ValueError where the checksum does not fit."""
    content = {key: own for key, own in value.items() if key != "sha256"}
    if value.get("sha256") != _json_sha256(content):
        raise ValueError("its checksum does not fit")
    return content


def _json_sha256(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Stamp(NamedTuple):
    """What changes when a file is written or replaced: by cp -p or rsync -t its size and its time may stay.

    Some network drives number files anew at each mount: what is kept of their files is then made anew, which is slow
    but right.
    """

    size: int
    mtime: int
    ctime: int
    inode: int

    @classmethod
    def of(cls, path: str | os.PathLike) -> "Stamp":
        """Raises OSError."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def ensure_regular(path: str | os.PathLike) -> None:
    """Raise OSError where the path is of no regular file: a pipe or a device might never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex. Raises OSError where it can't be read."""
    ensure_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
