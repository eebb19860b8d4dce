"""The figures of a run, step by step, for TensorBoard."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from util import files
from util.runtime import UserError, say


def require() -> type:
    """The class that writes for TensorBoard. Raises UserError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard; pip install tensorboard") from None
    return SummaryWriter


class Scalars:
    """A folder of one run's figures, written anew from the first step at every start: so none is there twice.

    folder: None writes nothing. What can't be written costs a line on stderr, not the run.
    """

    def __init__(self, folder: Path | None = None):
        """Raises UserError where the folder can't be written."""
        self._folder, self._writer = folder, None
        if folder:
            writer = require()
            files.ensure_writable(folder, "--results_dir")
            _empty(folder)
            try:
                self._writer = writer(folder, purge_step=0)  # for an open TensorBoard to forget the points before
            except UnicodeError:
                say(f"going on without figures for TensorBoard, which needs a --results_dir in UTF-8: {folder} is not")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step, each under its name."""
        if self._writer is None:
            return
        try:
            # Its own thread, which writes, would show a traceback.
            files.ensure_writable(self._folder, "--results_dir")
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except (OSError, UserError) as error:
            say(f"going on without figures for TensorBoard: {error}")
            self.close()

    def close(self) -> None:
        """Write what is left, and end the writer's thread, which would complain later of what it can't write."""
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.file_writer.close()  # SummaryWriter.close keeps the thread where its flush fails
            self._writer = None


def _empty(folder: Path) -> None:
    """Empty the files of an earlier start, and remove those that were emptied before.

    A TensorBoard that is open reads on from an empty file to the next; one that is gone it would wait for.
    """
    for old in folder.glob("events.out.tfevents.*"):
        with contextlib.suppress(OSError):  # what stays is purged
            if old.stat().st_size:
                os.truncate(old, 0)
            else:
                old.unlink()
