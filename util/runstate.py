"""The state of a run on the disk, so that a run that dies goes on: exactly where it was, mid-epoch too.

A state is kept beside the checkpoint that the run will make (`resnet18.state`, and `resnet18.state.previous`, the one
before), at the end of every epoch (but for short ones, while the last state is still being written), at least every
five minutes, and when a signal asks to stop. It goes when the run is finished and all its files are written.
"""

import contextlib
import hashlib
import io
import os
import signal
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from util import files, parsed
from util.processes import Processes, local_rank
from util.runtime import Stopped, UserError, is_out_of_memory, say

MAGIC = b"run state 2\n"
DIGEST = 64  # hex digits of a SHA-256
EVERY = 300  # seconds
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
ONE_WISH = 1.0  # seconds within which a second signal is the first once more: from the terminal, and from torchrun
SAVE = 1  # a process's wish to save; to stop, it wishes that and the signal's number together

State = dict[str, Any]  # of a run: nested dicts of tensors and plain values


def _digest(value: Any) -> bool:
    return value is None or parsed.text(value)


def _fits(checks: dict[str, parsed.Check]) -> parsed.Check:
    return lambda value: isinstance(value, dict) and not parsed.flaw(value, checks, checks)


# What the parts of a state may be that are asked for before its network takes the rest.
STATE_CHECKS = {
    "identity": parsed.a_dict,
    "figures": parsed.list_of(lambda value: isinstance(value, dict) and all(map(parsed.number(), value.values())), 0),
    "position": _fits({"epoch": parsed.whole(0), "iteration": parsed.whole(0)}),
    "begun": lambda value: value == {} or _fits({"replaces": _fits({"checkpoint": _digest, "result": _digest})})(value),
    "stretches": parsed.list_of(
        _fits({f"{end}_{what}": parsed.whole(0) for end in ("from", "to") for what in ("epoch", "batch")}), 0
    ),
}
NEEDED = ("identity", "figures", "position")  # an older state has no others


def save(state: State, path: Path) -> None:
    """Write the state, tensors and plain types, with its checksum; the one before is kept as <path>.previous.

    Raises UserError where it can't be written; then what was there is as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with files.replacing(path) as file:
        file.write(_head(payload))
        file.write(payload)
        files.sync(file)
        if path.exists():
            os.replace(path, previous(path))


def previous(path: Path) -> Path:
    """Where the state before the last one is."""
    return path.with_name(path.name + ".previous")


def find(path: Path) -> State | None:
    """The state at the path, or the one before where the run died between two renames; None where there is none.

    Raises UserError as `load` does.
    """
    for place in (path, previous(path), path):  # once more, as a run that goes on may have renamed it meanwhile
        with contextlib.suppress(FileNotFoundError):
            return load(place)
    return None


def load(path: Path) -> State:
    """The state in the file, whole; nothing in a file is ever run.

    Raises FileNotFoundError where there is no file, and UserError for one that is damaged.
    """
    try:
        files.ensure_regular(path)
        content = path.read_bytes()
        payload = memoryview(content)[len(MAGIC) + DIGEST + 1 :]
        if content[: len(content) - len(payload)] != _head(payload):
            raise ValueError("its checksum does not fit")
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling raises whatever the bytes lead it to
        if is_out_of_memory(error):
            raise
        raise _damaged(path, _line(error)) from None
    return state


def ensure_whole(state: State, path: Path) -> None:
    """Raise UserError where a state from the path is not as `Keeper` saves it."""
    if flaw := parsed.flaw(state, STATE_CHECKS, NEEDED) if isinstance(state, dict) else "the whole":
        raise _damaged(path, f"{flaw} is missing or wrong")


def _damaged(path: Path, reason: str) -> UserError:
    before = previous(path)
    advice = f"go on from the one before: mv {before} {path}" if before.exists() else "start over with --overwrite"
    return UserError(f"the run state {path} is damaged or can't be read ({reason}); {advice}")


def _head(payload: memoryview) -> bytes:
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class Keeper:
    """Keeps the state of one run: its lock, its file, and the signals that ask to stop.

    path: of the state; None keeps nothing. identity: what the run is, nested dicts of plain values. begun: how its
    present process began. Both are kept in the state. figures: of the epochs that are done. stretches: for each process
    that trained a part of the run, what it ran on, and where it began and ended: after from_epoch epochs and from_batch
    batches of the next one, and after to_epoch and to_batch. Of several processes the
    main one writes.
    """

    def __init__(self, path: Path | None = None, identity: State | None = None, processes: Processes | None = None):
        self.path, self.identity, self.processes = path, identity, processes or Processes()
        self.begun: State = {}
        self.state: State | None = None
        self.figures: list[dict[str, float]] = []
        self.stretches: list[State] = []
        self.heard, self.heard_at = 0, 0.0  # the signal that came to this process, and when
        self.stop = 0  # the signal that all processes have agreed to follow
        self.saved = time.monotonic()
        self._writer = ThreadPoolExecutor(1)
        self._written: Future | None = None
        self._last: State | None = None  # the state that is being written, or could not be

    def begin(self, state: State | None, **begun: Any) -> None:
        """Go on from the state that `find` gave, or, for None, start over: a state at the path is removed.

        Raises UserError where the state's file can't be renamed or removed.
        """
        self.processes.barrier()  # all have read what is changed now
        if self.processes.main:
            try:
                files.remove_leftovers(self.path)
                if state is None:
                    self._remove()
                elif not self.path.exists():
                    os.replace(previous(self.path), self.path)
            except OSError as error:
                raise UserError(f"cannot change {self.path}: {error.strerror or error}") from error
        self.state, self.begun = state, begun
        if state:
            self.figures = state["figures"]
            self.stretches = state.get("stretches") or [_stretch({}, {}, state["position"])]

    def begin_stretch(self, facts: State, epoch: int = 0) -> None:
        """Begin the stretch that this process trains, at the state's position, or else after so many epochs."""
        at = self.state["position"] if self.state else {"epoch": epoch}
        self.stretches.append(_stretch(facts, at, at))

    def tell(self, **facts: Any) -> None:
        """Add to what is known of this process's stretch."""
        if self.stretches:
            self.stretches[-1] |= facts

    def trained(self) -> list[State]:
        """The stretches in which something was trained."""
        ends = [[(part[f"{end}_epoch"], part[f"{end}_batch"]) for end in ("from", "to")] for part in self.stretches]
        return [part for part, (start, end) in zip(self.stretches, ends, strict=True) if start != end]

    def due(self) -> bool:
        """Whether the state ought to be saved now: a signal came, or the last time is five minutes ago.

        All processes get the same answer at the same step, and none waits for another.
        """
        if self.path is None:
            return False
        wish = SAVE + self.heard if self.heard or time.monotonic() - self.saved > EVERY else 0
        agreed = self.processes.previous_all_reduce_max(wish)
        self.stop = max(0, agreed - SAVE)
        return agreed > 0

    def idle(self) -> bool:
        """Whether a state can be saved without waiting for the one before; all processes get the same answer.

        A short epoch is over before the state of the one before is on the disk.
        """
        return bool(self.processes.broadcast(self._written is None or self._written.done()))

    def save(self, state: State) -> None:
        """Save the state, tensors and plain types that nobody changes any more, while the run goes on.

        Raises Stopped, once it is saved, where a signal asked to stop. A full disk costs a line on stderr, not the run;
        only where it is to stop, UserError is raised, which says where the state is instead.
        """
        if self.path is None:
            return
        self.saved = time.monotonic()
        if self.stretches:
            self.stretches[-1] |= _place("to", state["position"])
        if self.processes.main:
            if failed := self._failed():
                say(f"going on, but the run's state is not saved: {failed}")
            kept = {"identity": self.identity, "figures": list(self.figures), "begun": self.begun}
            kept["stretches"] = [dict(part) for part in self.trained()]
            self._last = {**state, **kept}
            self._written = self._writer.submit(save, self._last, self.path)
        if self.stop:
            if failed := self._failed():
                raise UserError(f"{failed}; {self._rescued()}")
            self.processes.barrier()
            raise Stopped(self.stop, self.path)

    def heed(self) -> None:
        """Raise Stopped where a signal asked to stop: of one process alone, in what takes long between two steps.

        The last state stays as it is.
        """
        if self.heard:
            raise Stopped(self.heard, self.path)

    def _failed(self) -> Exception | None:
        """Wait until the last state is written; give what kept it from being so."""
        failed = self._written and self._written.exception()
        if failed is None:
            self._written = self._last = None
        elif not isinstance(failed, UserError | MemoryError):
            raise failed
        return failed

    def _rescued(self) -> str:
        """Save, as a last resort, where there may be room, the state that could not be at its place; say where."""
        try:
            path = Path(tempfile.mkdtemp(prefix="run-"), self.path.name)
            save(self._last, path)
        except (OSError, UserError):
            return "its state can't be saved elsewhere either; make room, and go on from the last state with --resume"
        return f"its state is in {path}: make room, mv {path} {self.path}, and go on with --resume"

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Within it the files of a run are written whose training is done, and which is finished with it.

        Where one can't be written, the state stays, and the UserError says how to go on: nothing is trained once more.
        """
        try:
            yield
        except UserError as error:
            if not self.processes.main:
                raise
            kept = "the training is kept: put that right, and go on with --resume"
            raise UserError(f"{error}; {self._rescued() if self._failed() else kept}") from error
        self.finish()

    def finish(self) -> None:
        """Remove the state: the run is finished."""
        if self.processes.main:
            self._failed()  # which does not matter any more
            try:
                self._remove()
            except OSError as error:  # it is finished all the same
                say(f"{self.path}, the state of this finished run, can't be removed: {error.strerror or error}")
        self.processes.barrier()

    def _remove(self) -> None:
        for path in (self.path, previous(self.path)):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, *others: Path) -> Iterator[None]:
        """Hold the locks of the run's state and of the other files that it writes, so that no second run writes them.

        Raises UserError, which says who does.
        """
        with contextlib.ExitStack() as locks:
            if self.processes.main:
                for path in (self.path, *others):
                    try:
                        locks.enter_context(files.locked(path.with_name(f".{path.name}.lock")))
                    except files.Locked as error:
                        raise UserError(f"{path.stem} is being made by another run ({error}); wait for it") from None
                locks.callback(self._writer.shutdown)  # while the locks are held
            self.processes.barrier()
            yield

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take each of SIGNALS as the wish to save the state and stop; a second one stops at once.

        SIGHUP comes when the terminal hangs up, often twice, and is never the second; started with nohup, a run is not
        to hear it. Raises Stopped where a signal came too late for a step to follow it.
        """

        def hear(number: int, frame: object) -> None:
            again = self.heard and time.monotonic() - self.heard_at > ONE_WISH
            if again and number != getattr(signal, "SIGHUP", None):
                raise KeyboardInterrupt
            if not self.heard and local_rank() == 0:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping after this batch; once more to stop at once\n")  # print may be interrupted
            self.heard, self.heard_at = number, time.monotonic()

        heeded = [number for number in SIGNALS if not _under_nohup(number)]
        before = {number: signal.signal(number, hear) for number in heeded}
        try:
            yield
            if stop := self.processes.all_reduce_max(self.heard):
                raise Stopped(stop, self.path)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stretch(facts: State, start: State, end: State) -> State:
    return {**_place("from", start), **_place("to", end), **facts}


def _place(end: str, position: State) -> State:
    return {f"{end}_epoch": position.get("epoch", 0), f"{end}_batch": position.get("iteration", 0)}


def _under_nohup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def differences(there: State, now: State, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys of `now`, nested ones with dots, whose values are others in `there`, with both values, that there first.

    What `there` holds besides does not count.
    """
    found = {}
    for key, value in now.items():
        before = there.get(key)
        if isinstance(value, dict):
            found |= differences(before if isinstance(before, dict) else {}, value, f"{prefix}{key}.")
        elif before != value:
            found[prefix + key] = before, value
    return found


def refuse_difference(there: State, now: State, path: Path, advice: str, may_differ: Collection[str] = ()) -> None:
    """Raise UserError, naming a setting, where two identities differ, but for the keys that may."""
    for key, (before, after) in differences(there, now).items():
        if key not in may_differ:
            raise UserError(f"{path} comes from other settings ({key}: {before} there, {after} now); {advice}")


def flat(tree: State, prefix: str = "") -> State:
    """Nested dicts as one, keys joined by dots."""
    items = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items
