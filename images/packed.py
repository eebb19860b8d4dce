"""Images within a larger file, copied once, encoded as they are, into a file beside it from which any can be read."""

import hashlib
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from util import files
from util.files import Stamp
from util.runtime import UserError, say

KEY = 32  # bytes


class Packed:
    """The encoded images of one file, by their numbers.

    contents: gives the images' bytes in order; asked only where there is no copy yet, or the file has changed since.
    stamp: of the file before it was opened to give these contents.
    """

    def __init__(self, path: Path, contents: Callable[[], Iterator[bytes]], stamp: Stamp):
        self.path, self._contents, self.stamp = path, contents, stamp
        self._memory = self._ends = None

    def open(self) -> None:
        """Have the images at hand. Raises UserError where the file can't be read or there is no room for the copy."""
        if self._memory is not None:
            return
        kept = self.path.with_name(f".{self.path.name}.images")
        if not self._map(kept):
            try:
                with files.replacing(kept) as file:
                    self._write(file)
                self._map(kept)
            except UserError as error:
                if not isinstance(error.__cause__, OSError):  # of what is read, not of where it is written
                    raise
                self._open_temporary(error)

    def __getitem__(self, number: int) -> bytes:
        start = self._ends[number - 1] if number else 0
        return self._memory[start : self._ends[number]].tobytes()

    def _open_temporary(self, problem: UserError) -> None:
        say(f"the images of {self.path.name} are copied at each start ({problem})")
        try:
            with tempfile.TemporaryFile() as file:
                self._write(file)
                file.flush()
                self._map(file)
        except OSError as error:
            raise UserError(f"{problem}; nor can a temporary file be written: {error.strerror}") from None

    def _write(self, file: BinaryIO) -> None:
        """All images, one after the other; where each ends, int64; their number; a checksum of all that; the key."""
        ends, end, checksum = [], 0, 0
        for content in self._contents():
            file.write(content)
            checksum = zlib.crc32(content, checksum)
            end += len(content)
            ends.append(end)
        index = np.array([*ends, len(ends)], np.int64).tobytes()
        file.write(index + np.array(zlib.crc32(index, checksum), np.int64).tobytes() + self._key())

    def _map(self, kept: Path | BinaryIO) -> bool:
        """Whether the copy is there, whole, and of the file as it is now."""
        try:
            if isinstance(kept, Path):
                files.ensure_regular(kept)
            memory = np.memmap(kept, np.uint8, "r")
        except (OSError, ValueError):  # missing; empty
            return False
        if memory[-KEY:].tobytes() != self._key():
            return False
        memory, checksum = memory[: -KEY - 8], memory[-KEY - 8 : -KEY].tobytes()
        if checksum != np.array(zlib.crc32(memory), np.int64).tobytes():
            say(f"{kept} is damaged: the images of {self.path.name} are copied anew")
            return False
        number = int(np.frombuffer(memory[-8:].tobytes(), np.int64)[0])
        self._memory = memory
        self._ends = np.frombuffer(memory[-8 * (number + 1) : -8].tobytes(), np.int64)
        return True

    def _key(self) -> bytes:
        return hashlib.sha256(b"2 %d %d %d %d" % self.stamp).digest()


class Row(NamedTuple):
    """One of the images; as a path it is what messages call it by."""

    file: Packed
    number: int

    def __fspath__(self) -> str:
        return f"{self.file.path}[{self.number}]"

    def read(self) -> bytes:
        """The image as it is encoded."""
        return self.file[self.number]
