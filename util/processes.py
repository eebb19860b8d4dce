"""The processes of a run: one, or those that torchrun started, each of which works on its share of every batch.

torchrun tells each process its rank through the environment. Tensors on the CPU travel by gloo, those on CUDA by nccl,
those on Intel's GPUs by xccl.
"""

import functools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

# Long: a process may wait while another reads images or runs the teacher over them. One that dies is noticed at once.
TIMEOUT = timedelta(hours=6)
MEETING = timedelta(minutes=3)  # in which all of them must have started
ENDING = 10.0  # seconds
# The variables that torchrun sets, and their least values, which are those of a process alone.
LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # by which tensors on a device travel


class Lost(Exception):
    """Another process of the run is gone; this one can't go on alone."""


class NotJoined(Exception):
    """This process can't be one of several: the environment is wrong, or the others don't come. Says what to do."""


class Place(NamedTuple):
    """Where this process stands in its run, by the environment, and how often torchrun has restarted the run.

    wrong: what is wrong with the variables; the process counts as alone then, until `join` refuses it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    wrong: str = ""


def _place() -> Place:
    numbers = dict(LEAST)
    for name, least in LEAST.items():
        text = os.environ.get(name, str(least))
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
            return _wrong(f"{name} is {_shown(text)}, not a whole number from {least} on")
        numbers[name] = int(text)
    machine = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    for name, of in (("LOCAL_WORLD_SIZE", "WORLD_SIZE"), ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", machine)):
        if numbers[name] - LEAST[name] >= numbers[of]:
            return _wrong(f"{name} is {numbers[name]}, but {of} is {os.environ.get(of, 'not set')}")
    if numbers["WORLD_SIZE"] > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                return _wrong(f"WORLD_SIZE is {numbers['WORLD_SIZE']}, but {name} is not set")
        port = os.environ["MASTER_PORT"]
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            return _wrong(f"MASTER_PORT is {_shown(port)}, not a port from 1 to 65535")
    return Place(*numbers.values())


def _wrong(what: str) -> Place:
    return Place(wrong=f"{what}; {_advice()}")


def _advice() -> str:
    names = " ".join(name for name in LEAST if name in os.environ)
    return f"start several processes with torchrun, or, to run one, unset {names}"


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else f"{text[:37]}...")


def local_rank() -> int:
    """This process's number on its machine, from 0. Only number 0 speaks to the user."""
    return _place().local_rank


def local_size() -> int:
    """How many processes of the run are on this machine."""
    return _place().local_size


def size() -> int:
    """How many processes the run has, on all its machines."""
    return _place().size


def backend(device: str) -> str | None:
    """What tensors on devices of that type travel by between processes; None where this torch has nothing for it."""
    name = BACKENDS.get(device)
    return name if name and dist.is_available() and dist.is_backend_available(name) else None


def restarted() -> bool:
    """Whether torchrun started this process anew because one of the run had died."""
    return _place().restarts > 0


def torchrun() -> str:
    """The name of the torchrun that started this process, the same after a restart; "" without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"process {os.getppid()} on {socket.gethostname()}" if name == "none" else name


class Processes:
    """All processes of the run as seen from one of them; with one process, each method is next to nothing.

    rank: this process, 0 ... size - 1. Number 0, `main`, is the one that writes. Methods must be called by all
    processes, in the same order; they raise Lost where another process is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by the sum over the processes."""
        if self.size > 1:
            with _losing():
                dist.all_reduce(tensor)

    def average_gradients(self, network: torch.nn.Module, share: float) -> None:
        """Replace each gradient, of a mean over this process's part of a batch, by that over the whole batch.

        share: the part of the batch's images that are this process's.
        """
        if self.size > 1:
            gradients = [value.grad for value in network.parameters() if value.grad is not None]
            self._sum_together(gradients, share)

    def average_buffers(self, network: torch.nn.Module) -> None:
        """Replace batch norm's running statistics by their mean over the processes."""
        if self.size > 1:
            self._sum_together([value for value in network.buffers() if value.is_floating_point()], 1 / self.size)

    def _sum_together(self, tensors: list[torch.Tensor], weight: float) -> None:
        """The weighted sum over the processes, in place, in one message."""
        if not tensors:  # as the buffers of a network without batch norm
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors]).mul_(weight)
        self.all_reduce_sum(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

    def gathering(self, share: float) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What makes the whole batch, (B, ...), of the processes' parts of it, (b, ...); None for a process alone.

        share: the part of the batch's images that are this process's. All processes must compute the same scalar from
        what they gather; then its gradients, averaged by average_gradients, are those of one process.
        """
        return (lambda part: _Gathered.apply(part, share, self)) if self.size > 1 else None

    def broadcast(self, number: int) -> int:
        """The number that the main process gives."""
        told = torch.tensor(number)
        if self.size > 1:
            with _losing():
                dist.broadcast(told, 0)
        return int(told)

    def all_reduce_max(self, number: int) -> int:
        """The highest of the processes' numbers."""
        given = torch.tensor(number)
        if self.size > 1:
            with _losing():
                dist.all_reduce(given, dist.ReduceOp.MAX)
        return int(given)

    def previous_all_reduce_max(self, number: int) -> int:
        """The `all_reduce_max` of the call before this one, 0 at the first: it travelled meanwhile, so nobody waits.

        Alone, a process has its own number at once.
        """
        if self.size == 1:
            return number
        with _losing():
            before = 0
            if self._asked:
                given, work = self._asked
                work.wait()
                before = int(given)
            given = torch.tensor(number)
            self._asked = given, dist.all_reduce(given, dist.ReduceOp.MAX, async_op=True)
        return before

    def barrier(self) -> None:
        """Go on when all have come here."""
        self.all_reduce_max(0)

    @contextmanager
    def first_on_its_machine(self) -> Iterator[None]:
        """Let the first process of each machine do it (fetch, decode, compute), then the others (find it there)."""
        if local_rank() > 0:
            self.barrier()
        yield
        if local_rank() == 0:
            self.barrier()


class _Gathered(torch.autograd.Function):
    """The parts of a batch as Batches parts it, joined."""

    @staticmethod
    def forward(ctx, part: torch.Tensor, share: float, processes: Processes) -> torch.Tensor:
        n = round(len(part) / share)
        start = processes.rank * (n // processes.size) + min(processes.rank, n % processes.size)
        ctx.own, ctx.share = slice(start, start + len(part)), share
        whole = part.new_zeros(n, *part.shape[1:])
        whole[ctx.own] = part
        processes.all_reduce_sum(whole)
        return whole

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # Of one scalar that all processes have, not of a mean over this one's part, which average_gradients expects.
        return gradient[ctx.own] / ctx.share, None, None


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and nccl's errors are of many kinds, all of them RuntimeError
        raise Lost(str(error).partition("\n")[0]) from error


def join(device: str) -> Processes:
    """Join the processes that torchrun started, for devices of that type; alone where it did not start any.

    Only the main one has a stdout. Raises NotJoined.
    """
    place = _place()
    if place.wrong:
        raise NotJoined(place.wrong)
    if place.size == 1:
        return Processes()
    if not dist.is_initialized():
        try:
            store = _meet()
        except (RuntimeError, ValueError) as error:
            where = f"MASTER_ADDR {_shown(os.environ['MASTER_ADDR'])} and MASTER_PORT {os.environ['MASTER_PORT']}"
            reason = str(error).strip().partition("\n")[0]
            raise NotJoined(
                f"can't meet the {place.size} processes of WORLD_SIZE at {where} ({reason}); {_advice()}"
            ) from None
        with _losing():
            own = backend(device)
            names = f"cpu:gloo,{device}:{own}" if own else "gloo"
            dist.init_process_group(names, store=store, rank=place.rank, world_size=place.size, timeout=TIMEOUT)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115, it stays open as long as the process
    return Processes(dist.get_rank(), dist.get_world_size())


@functools.cache
def _meet() -> dist.Store:
    """Where the processes of the run leave each other messages."""
    with _silent_stderr():  # at each attempt torch writes a page
        store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
    store.set_timeout(TIMEOUT)
    # torchrun's store outlives a restart: without names of their own the processes would find the addresses of those
    # before them there (https://github.com/pytorch/pytorch/issues/135712).
    return dist.PrefixStore(f"start {_place().restarts}", store)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def leave() -> None:
    """Leave the others in good order, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fails_first() -> bool:
    """Whether this process, which ends with an error, is the first of its run that does: it tells of it, for all.

    Where they have not met yet, nor can, it is the first of each machine.
    """
    try:
        # One of the processes themselves would keep the store, and wait for the others to come.
        if dist.is_initialized() or (size() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
            return _meet().add("failed", 1) == 1
    except RuntimeError:  # who keeps it is gone
        pass
    return local_rank() == 0


def await_main() -> None:
    """Before this process ends with an error, let the main one end: torchrun kills all others when the first has ended.

    But where the error is this process's alone, the main one waits for it meanwhile, and is given some seconds only.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):  # who keeps the store has ended
            if dist.get_rank() == 0:
                _meet().set("main has ended", "")
            deadline = time.monotonic() + ENDING
            while not _meet().check(["main has ended"]) and time.monotonic() < deadline:
                time.sleep(0.1)
