"""The processes of a run: one, or those that torchrun started, each of which works on its share of every batch.

torchrun tells each process its rank through the environment. Tensors on the CPU travel by gloo, those on CUDA by nccl,
those on Intel's GPUs by xccl.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# Long: a process may wait while another reads images or runs the teacher over them. One that dies is noticed at once.
TIMEOUT = timedelta(hours=6)
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # by which tensors on a device travel


class Lost(Exception):
    """Another process of the run is gone; this one can't go on alone."""


def local_rank() -> int:
    """This process's number on its machine, from 0. Only number 0 speaks to the user."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def size() -> int:
    """How many processes the run has, on all its machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def backend(device: str) -> str | None:
    """What tensors on devices of that type travel by between processes; None where this torch has nothing for it."""
    name = BACKENDS.get(device)
    return name if name and dist.is_available() and dist.is_backend_available(name) else None


def restarted() -> bool:
    """Whether torchrun started this process anew because one of the run had died."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


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

    Only the main one has a stdout.
    """
    if size() == 1:
        return Processes()
    if not dist.is_initialized():
        with _losing():
            store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            # torchrun's store outlives a restart: without names of their own the processes would find the addresses
            # of those before them there (https://github.com/pytorch/pytorch/issues/135712).
            store = dist.PrefixStore(f"start {_restarts()}", store)
            own = backend(device)
            names = f"cpu:gloo,{device}:{own}" if own else "gloo"
            dist.init_process_group(names, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open as long as the process
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the others in good order, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
