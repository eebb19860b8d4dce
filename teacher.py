"""The frozen teacher: its outputs for a batch of images, computed live or once for all and remembered.

Without augmentation a teacher's outputs for an image never change: one pass over the training images serves all rows,
seeds and epochs, and is kept on the disk for the next command. With augmentation an image has 162 views (9 x 9 crops,
flipped or not); the logits of each are computed when it is first seen, and kept as well. Of large images, whose crops
are resized, no two views are alike: the teacher runs at every step.
"""

import hashlib
import io
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from data import VIEWS, Batch, Batches, Statistics
from models import folded
from outputs import Outputs
from util import files
from util.runtime import Runtime, UserError, free_memory, inference_batch, say, send

CACHE_FORMAT = 4
SEAL_SIZE = len(b"crc32:") + 8  # bytes at the end of a file of remembered outputs
WILD = 1000  # an image's map is wild where its mean square is so many times the median's

Source = Callable[[Batch], Outputs]
Normalisation = tuple[Statistics, Statistics]  # mean and standard deviation


class Teacher:
    """A teacher in eval mode, its parameters frozen, batch norm folded into the convolutions.

    Called with a batch, it gives all its outputs: logits, feature maps, its head, through which a gradient reaches the
    student, and the images' index. forward: what its images go through, the network, or the network compiled.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        runtime: Runtime,
        sha256: str,
        top1: float,
        *,
        cache_dir: Path | None = None,
        needs: Iterable[str] = (),
        shown: Normalisation | None = None,
        normalisation: Normalisation | None = None,
        given: Normalisation | None = None,
        stem: str | None = None,
        key: str | None = None,
    ):
        """sha256: of the checkpoint. top1: its accuracy, in percent. cache_dir: None never remembers outputs.

        needs: what all rows to come will ask for, so that the one pass had better keep it from the start.
        shown: how the images of the batches are normalised; normalisation: how the teacher wants them, where it
        differs. given: it, where it is the user's and not the checkpoint's word. stem: of the network, likewise.
        key: of the set of weights in the checkpoint, likewise.

        classifier: what its outputs tell of its final layers, whatever the batch.
        """
        # The same weights can fit networks that differ in their stem's strides alone.
        self.built = f"{type(network).__qualname__} {network}"
        self.network = self.forward = folded(network).to(runtime.device)
        self.classifier = {"head": self.network.classify, "prototypes": models.prototypes(self.network)}
        self.runtime, self.sha256, self.top1, self.cache_dir = runtime, sha256, top1, cache_dir
        self.needs, self.given, self.stem, self.key = frozenset(needs), given, stem, key
        self.rescale = None if normalisation in (None, shown) else _rescaling(shown, normalisation, runtime.device)
        self.caches: dict[str, TeacherCache] = {}  # for each set of images, by its fingerprint
        self.views: dict[str, Views] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two teachers the same: the file, and where the user says them its normalisation and its stem."""
        told = {"sha256": self.sha256, "normalisation": self.given and [list(values) for values in self.given]}
        return told | ({"stem": self.stem} if self.stem else {}) | ({"weights_key": self.key} if self.key else {})

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        images = batch.images
        if self.rescale:
            scale, shift = self.rescale
            images = images * scale + shift
        with self.runtime.autocast():
            return self.forward(images)._replace(**self.classifier, index=batch.index)

    def cache_key(self, batches: Batches) -> str:
        """Differs where the teacher's weights or layers, the images, their normalisation or the arithmetic do."""
        parts = [
            CACHE_FORMAT,
            self.sha256,
            self.built,
            self.runtime.device.type,
            self.runtime.precision,
            batches.fingerprint(),
        ]
        parts += [scale.flatten().tolist() for scale in self.rescale or ()]
        parts += [self.key] if self.key else []
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]

    def make_room(self, key: str, size: int) -> None:
        """Remove from the cache what other teachers or data left there; UserError where `size` bytes still don't fit.

        The folder's lock must be held, as also what another process is writing is taken for left there.
        """
        leftovers = self.cache_dir.glob(".*.tmp")  # of processes that were killed
        for old in [*self.cache_dir.glob("*_*.np[yz]"), *leftovers]:
            if not old.name.startswith(key):
                old.unlink(missing_ok=True)
        if size > 0.9 * shutil.disk_usage(self.cache_dir).free:
            raise UserError(f"{self.cache_dir} has no room for {size / 1e6:,.1f} MB")

    @contextmanager
    def locked_cache(self) -> Iterator[None]:
        """Hold the cache's lock, in a folder that can be written; else UserError."""
        files.ensure_writable(self.cache_dir, "--checkpoint_dir")
        with files.locked(self.cache_dir / ".lock", wait=True):
            yield

    def source(self, batches: Batches, needs: frozenset[str], heed: Callable[[], None] = lambda: None) -> Source:
        """What gives this teacher's outputs fastest for these batches: remembered ones where they can be, else itself.

        needs: the outputs that are asked for, by their names in Outputs and of the stages, "stages" meaning each
        of them. What is remembered is shared by all later calls for the same images; of several processes on a machine
        the first computes it. Of mixed images, which are never seen twice, nothing is. heed: called before each batch
        that is shown to the teacher ahead of the steps, to raise what ends that.
        """
        if self.cache_dir is None or batches.mixing:
            return self
        if "stages" in needs | self.needs:
            stages = models.shapes(self.network, batches.size, batches.n_images).maps.keys()
            needs, self.needs = (
                named - {"stages"} | stages if "stages" in named else named for named in (needs, self.needs)
            )
        if batches.augment:
            return self._view_source(batches, needs, heed)
        cache = self.caches.setdefault(batches.fingerprint(), TeacherCache(self))
        with self.runtime.processes.first_on_its_machine():
            cache.fill(batches, needs | self.needs | {"logits"})
        return cache.source(needs) if needs <= cache.values.keys() else self

    def _view_source(self, batches: Batches, needs: frozenset[str], heed: Callable[[], None]) -> Source:
        key = batches.fingerprint()
        if batches.resizes or not needs <= {"logits"}:  # a resized crop hardly ever comes again
            return self
        # Of several processes each would fill a table with what only the others use.
        alone = self.runtime.processes.size == 1
        if key not in self.views and alone and Views.size(self, batches) < free_memory(self.runtime.device) / 2:
            self.views[key] = Views(self, batches)
        return self.views[key].of(batches, heed) if key in self.views else self


def _rescaling(shown: Normalisation, wanted: Normalisation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What to multiply images normalised in one way by, and to add to them, to have them normalised in the other."""
    (mean, std), (wanted_mean, wanted_std) = (
        [torch.tensor(part, device=device).view(3, 1, 1) for part in pair] for pair in (shown, wanted)
    )
    return std / wanted_std, (mean - wanted_mean) / wanted_std


class TeacherCache:
    """The teacher's outputs for all images of one set, looked up by index: those that could be kept.

    On the device where there is room; else in memory-mapped files, which the system keeps in memory while it can.
    values: (N, ...) each, by name; maps with their channels last, as convolutions give them.
    """

    def __init__(self, teacher: Teacher):
        self.teacher, self.device = teacher, teacher.runtime.device
        self.values: dict[str, torch.Tensor] = {}
        self.tried: frozenset[str] = frozenset()

    def source(self, names: frozenset[str]) -> Source:
        """A function from a batch of the set's images to the outputs of these names."""

        def outputs(batch: Batch) -> Outputs:
            found = {name: self._look_up(self.values[name], batch) for name in names}
            logits, last_map = found.pop("logits", None), found.pop("last_map", None)
            return Outputs(logits, last_map, found, **self.teacher.classifier, index=batch.index)

        return outputs

    def _look_up(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        here = values.device == self.device
        found = values[batch.index] if here else send(values[batch.host_index], self.device)
        return found.permute(0, 3, 1, 2) if found.ndim == 4 else found

    def fill(self, batches: Batches, names: frozenset[str]) -> None:
        """Have these outputs, or, where not all can be kept, the logits alone. Each is tried, and told of, once."""
        new, self.tried = names - self.tried, self.tried | names
        if new and not self._make(batches, new) and "logits" in new - {*self.values} and len(new) > 1:
            self._make(batches, frozenset({"logits"}))
        if "last_map" in new & self.values.keys():
            self._warn_of_wild_maps()

    def _make(self, batches: Batches, names: frozenset[str]) -> bool:
        """Open what is on the disk for this very teacher, data and precision; compute and write what is not.

        False, and a line on stderr, where that can't be written.
        """
        key, forms = self.teacher.cache_key(batches), self._forms(batches, names)
        paths = {name: self.teacher.cache_dir / f"{key}_{name}.npy" for name in forms}
        try:
            with self.teacher.locked_cache():  # two runs that start together compute it once
                values = {name: _opened(paths[name], *form) for name, form in forms.items()}
                if missing := {name: paths[name] for name, value in values.items() if value is None}:
                    for path in filter(Path.exists, missing.values()):
                        say(f"{path} is damaged: the teacher's outputs in it are computed anew")
                    self._write(batches, key, missing, forms)
                    values |= {name: _opened(path, *forms[name]) for name, path in missing.items()}
                if any(value is None for value in values.values()):
                    raise OSError("what was written reads back as something else")
                self.values |= {name: self._placed(value) for name, value in values.items()}
                return True
        except (UserError, OSError) as error:  # no room; another run made room for its own
            told = " and ".join(name.replace("_", " ") for name in forms)
            say(f"the teacher's {told} are not kept; it is run at every step that needs them ({error})")
            return False

    def _placed(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the device, if there is room, else as they are."""
        if self.device.type != "cpu" and values.nbytes < free_memory(self.device) / 2:
            return values.to(self.device)
        return values

    def _forms(self, batches: Batches, names: frozenset[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape and the type of each output for all images, the logits first."""
        n = batches.n_images
        shapes = models.shapes(self.teacher.network, batches.size, n)
        # Half precision halves the files and keeps more digits than bf16 arithmetic gave; fp32 stays plain.
        kind = np.dtype(np.float16 if self.teacher.runtime.precision == "bf16" else np.float32)
        forms = {"logits": ((n, shapes.classes), np.dtype(np.float32))}
        maps = {"last_map": shapes.last_map, **shapes.maps} if shapes.last_map else shapes.maps
        for name, (channels, height, width) in maps.items():
            forms[name] = ((n, height, width, channels), kind)
        return {name: form for name, form in forms.items() if name in names}

    def _write(
        self,
        batches: Batches,
        key: str,
        paths: dict[str, Path],
        forms: dict[str, tuple[tuple[int, ...], np.dtype]],
    ) -> None:
        """One pass of the teacher over all images, into the files. Those of other teachers or data make room first."""
        self.teacher.make_room(key, sum(int(np.prod(forms[name][0])) * forms[name][1].itemsize for name in paths))
        with files.replacing_all(list(paths.values())) as opened:
            sinks = dict(zip(paths, opened, strict=True))
            sums = {name: _checksum(path.name.encode()) for name, path in paths.items()}

            def write(name: str, content: bytes) -> None:
                sinks[name].write(content)
                sums[name] = _checksum(content, sums[name])

            for name in sinks:
                write(name, _header(*forms[name]))
            for batch in batches.of(torch.arange(batches.n_images), 0, inference_batch(batches.device)):
                outputs = self.teacher(batch)
                values = {"logits": outputs.logits, "last_map": outputs.last_map, **outputs.maps}
                for name in sinks:
                    write(name, _bytes(values[name], forms[name][1], name))
            for name, sink in sinks.items():
                sink.write(_seal(sums[name]))

    def _warn_of_wild_maps(self) -> None:
        """A line where a few images' maps are so large that a loss of maps would see nothing else."""
        maps = self.values["last_map"]
        squares = torch.cat([part.float().square().mean((1, 2, 3)) for part in maps.split(250)])
        median, largest = squares.median().item(), squares.max().item()
        if largest > WILD * median:
            wild = int((squares > WILD * median).sum())
            say(
                f"the teacher gives {wild} of {len(squares):,} images huge feature maps (mean square up to "
                f"{largest:.3g}, the median image's is {median:.3g}): a loss of feature maps will hardly learn from "
                "it; train the teacher with a smaller --learning_rate, or longer"
            )


def _bytes(values: torch.Tensor, kind: np.dtype, name: str) -> bytes:
    """The values, maps with their channels last, as they stand in a file. Raises UserError where they overflow."""
    values = values.float()
    if values.abs().max() > np.finfo(kind).max:
        raise UserError(f"some values of its {name.replace('_', ' ')} are too large for {kind}")
    values = values.permute(0, 2, 3, 1) if values.ndim == 4 else values
    # Rounded and put in order on the device, which is quick at it, so that no more than what is kept comes from there.
    return values.to(getattr(torch, kind.name)).contiguous().cpu().numpy().tobytes()


_checksum = zlib.crc32  # of gigabytes of maps, a second for each; SHA-256 takes two, or three


def _seal(checksum: int) -> bytes:
    """The end of a file of outputs whose name, header and values have that checksum."""
    return b"crc32:%08x" % checksum


def _header(shape: tuple[int, ...], kind: np.dtype) -> bytes:
    """How a file of such an array begins, in NumPy's format."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _opened(path: Path, shape: tuple[int, ...], kind: np.dtype) -> torch.Tensor | None:
    """The array in the file, memory-mapped. None if the file is missing, damaged, or of another name or form."""
    header = _header(shape, kind)
    end = len(header) + int(np.prod(shape)) * kind.itemsize
    try:
        memory = np.memmap(path, np.uint8, mode="c")
    except (OSError, ValueError):  # missing; empty
        return None
    if len(memory) != end + SEAL_SIZE or memory[: len(header)].tobytes() != header:
        return None
    if memory[end:].tobytes() != _seal(_checksum(memory[:end], _checksum(path.name.encode()))):
        return None
    return torch.from_numpy(memory[len(header) : end].view(kind).reshape(shape))


def _filled_up(indices: torch.Tensor, size: int) -> torch.Tensor:
    """The indices with the first one repeated until they are whole batches of that size.

    For each new shape a GPU's convolutions are chosen by trial, which takes it longer than the images that are added.
    """
    return torch.cat([indices, indices[:1].expand(-len(indices) % size)])


class Views:
    """A table of the teacher's logits for each view of each image, filled epoch by epoch as views are first seen.

    What one epoch adds to it is also a file in the cache's folder, from which the runs to come, and those beside this
    one, fill theirs: "key", the cache's; "views", int64 (n,), which view of which image; "logits", (n, classes).
    """

    def __init__(self, teacher: Teacher, batches: Batches):
        self.teacher, self.key = teacher, teacher.cache_key(batches)
        device, n, classes = teacher.runtime.device, batches.n_images, teacher.network.num_classes
        self.table = torch.empty(n * VIEWS, classes, dtype=self._kind(teacher), device=device)
        self.filled = torch.zeros(n * VIEWS, dtype=torch.bool)  # on the CPU: to ask it is not to wait for the device
        self.seen: set[Path] = set()  # files
        self.keeps, self.overflows = True, False

    @staticmethod
    def _kind(teacher: Teacher) -> torch.dtype:
        return torch.float16 if teacher.runtime.precision == "bf16" else torch.float32

    @classmethod
    def size(cls, teacher: Teacher, batches: Batches) -> int:
        """The table's size in bytes."""
        return batches.n_images * VIEWS * teacher.network.num_classes * cls._kind(teacher).itemsize

    def of(self, batches: Batches, heed: Callable[[], None]) -> Source:
        """A function from a batch of `batches` to the teacher's outputs. heed: see Teacher.source."""
        current, views = None, None

        def outputs(batch: Batch) -> Outputs:
            nonlocal current, views
            if batch.epoch != current:
                current, views = batch.epoch, None if self.overflows else self._fill(batches, batch.epoch, heed)
            if self.overflows:
                return self.teacher(batch)
            logits = self.table[views[batch.index]]
            return Outputs(logits=logits.float(), **self.teacher.classifier, index=batch.index)

        return outputs

    def _fill(self, batches: Batches, epoch: int, heed: Callable[[], None]) -> torch.Tensor:
        """Have the views of that epoch in the table; give each image's place there, on the device."""
        views = torch.arange(batches.n_images) * VIEWS + batches.view_codes(epoch)
        self._read()
        on_device = views.to(self.teacher.runtime.device)
        missing = (~self.filled[views]).nonzero().squeeze(1)
        if len(missing):
            size, made = inference_batch(batches.device), 0
            whole = missing if batches.device.type == "cpu" else _filled_up(missing, size)
            try:
                for batch in batches.of(whole, epoch, size):
                    heed()
                    self.table[on_device[batch.index]] = self.teacher(batch).logits.to(self.table.dtype)
                    made += len(batch.index)
            finally:  # what is made is kept where a signal ends it, too
                self._take(views[missing[:made]])
        return on_device

    def _take(self, views: torch.Tensor) -> None:
        """Take note that the table has these views, and keep them; where some are infinite there, use none of it."""
        if not self.table[views.to(self.table.device)].isfinite().all():
            self.overflows = True
            say("some of the teacher's logits are too large for half precision: it is run at every step")
        elif len(views):
            self.filled[views] = True
            self._keep(views)

    def _read(self) -> None:
        """Fill in what the files have that were not read yet; damaged ones are named and removed."""
        for path in sorted({*self.teacher.cache_dir.glob(f"{self.key}_views_*.npz")} - self.seen):
            self.seen.add(path)
            try:
                views, logits = self._checked(path)
            except FileNotFoundError:  # another run made room for its own
                continue
            except Exception:  # zipfile and NumPy raise whatever the bytes lead them to
                say(f"{path} is damaged: the teacher's outputs in it are computed anew")
                with suppress(OSError):  # read-only
                    path.unlink()
                continue
            self.table[views.to(self.table.device)] = logits.to(self.table.device)
            self.filled[views] = True

    def _checked(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """The views in the file and their logits. Raises what zipfile or NumPy raise, or ValueError, for damage."""
        with np.load(path, allow_pickle=False) as file:  # zipfile checks each array's CRC-32
            key, *arrays = (file[name] for name in ("key", "views", "logits"))
        views, logits = map(torch.from_numpy, arrays)
        right = str(key) == self.key and views.dtype == torch.int64 and views.ndim == 1 and logits.ndim == 2
        right = right and logits.dtype == self.table.dtype and logits.shape == (len(views), self.table.shape[1])
        if not right or not logits.isfinite().all() or (views < 0).any() or (views >= len(self.filled)).any():
            raise ValueError(f"{path} holds no logits of these views")
        return views, logits

    def _keep(self, views: torch.Tensor) -> None:
        """Write these views' logits into a file. Where that can't be done, a line on stderr, once."""
        if not self.keeps:
            return
        logits = self.table[views.to(self.table.device)].cpu().numpy()
        name = hashlib.sha256(views.numpy().tobytes()).hexdigest()[:16]
        path = self.teacher.cache_dir / f"{self.key}_views_{name}.npz"
        self.seen.add(path)
        try:
            with self.teacher.locked_cache():
                self.teacher.make_room(self.key, logits.nbytes + views.nbytes)
                with files.replacing(path) as file:
                    np.savez(file, key=np.array(self.key), views=views.numpy(), logits=logits)
        except (UserError, OSError) as error:
            self.keeps = False
            say(f"the teacher's logits of augmented images are not kept for other runs ({error})")
