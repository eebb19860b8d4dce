"""The frozen teacher: its outputs for a batch of images, computed live or once for all and remembered.

Without augmentation a teacher's outputs for an image never change: one pass over the training images serves all rows,
seeds and epochs, and is kept on the disk for the next command. With augmentation an image has 162 views (9 x 9 crops,
flipped or not); the logits of each are computed when it is first seen.
"""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data import VIEWS, Batch, Batches
from models import CifarResNet, Outputs, folded
from util import files
from util.runtime import Runtime, UserError, free_memory, inference_batch, say

CACHE_FORMAT = 2


class Teacher:
    """A teacher in eval mode, its parameters frozen, batch norm folded into the convolutions.

    Called with a batch, it gives the outputs that a loss asks for: logits, the last feature map, and its head, through
    which a gradient reaches the student.
    """

    def __init__(
        self,
        network: CifarResNet,
        runtime: Runtime,
        sha256: str,
        top1: float,
        cache_dir: Path | None = None,
        keep_maps: bool = False,
    ):
        """sha256: of the checkpoint. top1: its accuracy, in percent. cache_dir: None never remembers outputs.

        keep_maps: some row will ask for feature maps, so that the one pass had better keep them from the start.
        """
        self.keep_maps = keep_maps
        self.network = folded(network).to(runtime.device)
        self.runtime, self.sha256, self.top1, self.cache_dir = runtime, sha256, top1, cache_dir
        self.remembered: Remembered | None = None
        self.tried: bool | None = None  # to remember outputs; with maps or without
        self.views: Views | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        with self.runtime.autocast():
            return self.network(batch.images)._replace(head=self.network.classify)

    def source(self, batches: Batches, with_maps: bool) -> Callable[[Batch], Outputs]:
        """What gives this teacher's outputs fastest for these batches: remembered ones where they can be, else itself.

        with_maps: whether feature maps are asked for, too. What is remembered is shared by all later calls; of several
        processes on a machine the first computes it.
        """
        if self.cache_dir is None:
            return self
        if not batches.augment:
            if self.tried is None or (with_maps and not self.tried):
                with self.runtime.processes.first_on_its_machine():
                    self._remember(batches, with_maps or self.keep_maps)
            lacks = self.remembered is None or (with_maps and self.remembered.maps is None)
            return self if lacks else functools.partial(self.remembered, with_maps=with_maps)
        if not with_maps and self.views is None and self._has_room_for_views(batches):
            self.views = Views(self, batches)
        return self if with_maps or self.views is None else self.views.of(batches)

    def _remember(self, batches: Batches, with_maps: bool) -> None:
        """Logits and, if with_maps, maps, in one pass; where maps can't be kept, logits alone. Tried but once."""
        self.tried = with_maps
        self.remembered = Remembered.make(self, batches, self.cache_dir, with_maps)
        if self.remembered is None and with_maps:
            self.remembered = Remembered.make(self, batches, self.cache_dir, False)

    def _has_room_for_views(self, batches: Batches) -> bool:
        # Of several processes each would fill a table with what only the others use.
        alone = self.runtime.processes.size == 1
        return alone and Views.size(self, batches) < free_memory(self.runtime.device) / 2


class Remembered:
    """The teacher's outputs for all images, looked up by index.

    On the device where there is room; else in memory-mapped files, which the system keeps in memory while it can.
    """

    def __init__(self, teacher: Teacher, paths: dict[str, Path]):
        self.head, self.device = teacher.network.classify, teacher.runtime.device
        self.logits = self._open(paths["logits"])
        self.maps = self._open(paths["maps"]) if "maps" in paths else None

    def __call__(self, batch: Batch, with_maps: bool) -> Outputs:
        # Maps are kept channels last, as convolutions give them.
        layer4 = self._look_up(self.maps, batch).permute(0, 3, 1, 2) if with_maps else None
        return Outputs(logits=self._look_up(self.logits, batch), layer4=layer4, head=self.head)

    def _look_up(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        if values.device == self.device:
            return values[batch.index]
        return values[batch.host_index].pin_memory().to(self.device, non_blocking=True)

    def _open(self, path: Path) -> torch.Tensor:
        values = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        if self.device.type != "cpu" and values.nbytes < free_memory(self.device) / 2:
            return values.to(self.device)
        return values

    @classmethod
    def make(cls, teacher: Teacher, batches: Batches, folder: Path, with_maps: bool) -> "Remembered | None":
        """Open what is on the disk for this very teacher, data and precision; compute and write what is not.

        None, and a line on stderr, where that can't be written.
        """
        shapes = cls._shapes(teacher, batches, with_maps)
        key = cls._key(teacher, batches)
        paths = {name: folder / f"{key}_{name}.npy" for name in shapes}
        try:
            files.ensure_writable(folder, "--checkpoint_dir")
            with files.locked(folder / ".lock", wait=True):  # two runs that start together compute it once
                missing = {name: shapes[name] for name, path in paths.items() if not _is_whole(path, *shapes[name])}
                if missing:
                    cls._write(teacher, batches, {name: (paths[name], *missing[name]) for name in missing})
                return cls(teacher, paths)
        except (UserError, OSError, ValueError) as error:  # no room; another run made room for its own
            say(f"the teacher's {' and '.join(shapes)} are not kept; it is run at every step that needs them ({error})")
            return None

    @staticmethod
    def _shapes(teacher: Teacher, batches: Batches, with_maps: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        n, side = batches.n_images, -(-batches.size // 8)
        shapes = {"logits": ((n, teacher.network.fc.out_features), np.dtype(np.float32))}
        if with_maps:
            # Half precision halves the files and keeps more digits than bf16 arithmetic gave; fp32 stays plain.
            kind = np.float16 if teacher.runtime.precision == "bf16" else np.float32
            shapes["maps"] = ((n, side, side, teacher.network.fc.in_features), np.dtype(kind))
        return shapes

    @staticmethod
    def _key(teacher: Teacher, batches: Batches) -> str:
        """Differs where the teacher's weights, the images, their normalisation or the arithmetic do."""
        runtime = teacher.runtime
        digest = hashlib.sha256(f"{CACHE_FORMAT} {teacher.sha256} {runtime.device.type} {runtime.precision}".encode())
        digest.update(batches.fingerprint().encode())
        return digest.hexdigest()[:32]

    @staticmethod
    def _write(teacher: Teacher, batches: Batches, wanted: dict[str, tuple[Path, tuple[int, ...], np.dtype]]) -> None:
        """One pass of the teacher over all images, into the files. Those of other teachers or data make room first."""
        folder = next(iter(wanted.values()))[0].parent
        key = next(iter(wanted.values()))[0].name.split("_")[0]
        for old in [*folder.glob("*_*.npy"), *folder.glob(".*.tmp")]:  # the latter of a process that was killed
            if not old.name.startswith(key):
                old.unlink(missing_ok=True)
        needed = sum(int(np.prod(shape)) * kind.itemsize for _, shape, kind in wanted.values())
        if needed > 0.9 * shutil.disk_usage(folder).free:
            raise UserError(f"{folder} has no room for {needed / 1e6:,.1f} MB")
        with files.replacing_all([path for path, _, _ in wanted.values()]) as opened:
            sinks = dict(zip(wanted, opened, strict=True))
            for name, (_, shape, kind) in wanted.items():
                header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(sinks[name], header)
            for batch in batches.of(torch.arange(batches.n_images), 0, inference_batch(batches.device)):
                outputs = teacher(batch)
                values = {"logits": outputs.logits, "maps": outputs.layer4.permute(0, 2, 3, 1)}
                for name, (_, _, kind) in wanted.items():
                    value = values[name].float().cpu()
                    if value.abs().max() > np.finfo(kind).max:
                        raise UserError(f"some of its {name} are too large for {kind}")
                    sinks[name].write(value.numpy().astype(kind).tobytes())


def _is_whole(path: Path, shape: tuple[int, ...], kind: np.dtype) -> bool:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing; cut short; not such a file
        return False
    return values.shape == shape and values.dtype == kind


class Views:
    """A table of the teacher's logits for each view of each image, filled epoch by epoch as views are first seen."""

    def __init__(self, teacher: Teacher, batches: Batches):
        self.teacher = teacher
        device, n, classes = teacher.runtime.device, batches.n_images, teacher.network.fc.out_features
        self.table = torch.empty(n, VIEWS, classes, dtype=self._kind(teacher), device=device)
        self.filled = torch.zeros(n, VIEWS, dtype=torch.bool)  # on the CPU: to ask it is not to wait for the device

    @staticmethod
    def _kind(teacher: Teacher) -> torch.dtype:
        return torch.float16 if teacher.runtime.precision == "bf16" else torch.float32

    @classmethod
    def size(cls, teacher: Teacher, batches: Batches) -> int:
        """The table's size in bytes."""
        return batches.n_images * VIEWS * teacher.network.fc.out_features * cls._kind(teacher).itemsize

    def of(self, batches: Batches) -> Callable[[Batch], Outputs]:
        """A function from a batch of `batches` to the teacher's outputs."""
        current, codes = None, None

        def outputs(batch: Batch) -> Outputs:
            nonlocal current, codes
            if batch.epoch != current:
                current, codes = batch.epoch, self._fill(batches, batch.epoch)
            logits = self.table[batch.index, codes[batch.index]]
            return Outputs(logits=logits.float(), head=self.teacher.network.classify)

        return outputs

    def _fill(self, batches: Batches, epoch: int) -> torch.Tensor:
        """Compute the views of that epoch that are not in the table yet; give each image's view, on the device."""
        codes = batches.view_codes(epoch)
        everything = torch.arange(batches.n_images)
        missing = everything[~self.filled[everything, codes]]
        device_codes = codes.to(self.teacher.runtime.device)
        for batch in batches.of(missing, epoch, inference_batch(batches.device)):
            self.table[batch.index, device_codes[batch.index]] = self.teacher(batch).logits.to(self.table.dtype)
        self.filled[everything, codes] = True
        return device_codes
