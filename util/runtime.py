"""What a run runs on: device, precision, processes; what it says; and the exceptions that end it with one line."""

import argparse
import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from util import processes
from util.processes import Processes


class UserError(Exception):
    """A mistake of the user's, as one line that says what is wrong and what to do. Scripts print it and exit with 2."""


class Diverged(Exception):
    """The loss or the weights became NaN or infinite. Scripts print it and exit with 1."""


class Stopped(Exception):
    """A signal asked to stop, and the run's state is saved. Scripts say how to go on and exit as the signal asks."""

    def __init__(self, number: int, path: Path):
        super().__init__(number, path)
        self.number, self.path = number, path


@dataclass(frozen=True)
class Runtime:
    """The device, the arithmetic's precision, "bf16" (autocast, losses in float32) or "fp32", and the processes."""

    device: torch.device
    precision: str
    processes: Processes = field(default_factory=Processes, compare=False)

    def autocast(self) -> torch.autocast:
        """The context to run networks in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def describe(self) -> str:
        """The device in words, for the results."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def device_name(text: str) -> str:
    """An argparse type, for --device: "auto", "cpu", "cuda" or "cuda:N". Whether it is there is `choose`'s question."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise argparse.ArgumentTypeError(f"{shown} is not auto, cpu, cuda or cuda:N (N is a GPU's number, from 0)")
    return text


def choose(device: str = "auto", precision: str = "auto") -> Runtime:
    """The runtime for --device, see `device_name`, and --precision auto|fp32|bf16.

    auto takes CUDA where there is one, and bf16 where the device computes in it. What is in float32 is plain float32,
    never TF32. Under torchrun each process of a machine takes a GPU of its own. Raises UserError for cuda where there
    is none, or none left.
    """
    wants_cuda = device.startswith("cuda")
    if wants_cuda and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is available here; use --device cpu, or auto")
    chosen = _gpu(device) if wants_cuda or (device == "auto" and torch.cuda.is_available()) else torch.device("cpu")
    if precision == "auto":
        precision = "bf16" if _computes_in_bf16(chosen) else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # cuDNN times its algorithms once for each shape: an epoch has two, the full batch and the last short one.
    torch.backends.cudnn.benchmark = True
    if chosen.type == "cpu":
        keep_freed_memory()
    return Runtime(chosen, precision, processes.join(chosen.type == "cuda"))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for what is allocated next.

    Else it gives large blocks back to the system at once, and every step has all pages of its activations cleared and
    mapped in again. Does nothing where the C library is another one.
    """
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**31 - 1)


def _gpu(device: str) -> torch.device:
    """The GPU that --device names, else this process's; with its number, so that it equals its tensors' device."""
    number, there = processes.local_rank(), torch.cuda.device_count()
    if device.startswith("cuda:"):
        number = int(device.removeprefix("cuda:"))
        if processes.local_size() > 1:
            raise UserError(f"--device {device}: under torchrun each process has a GPU of its own; use --device cuda")
        if number >= there:
            names = "only cuda:0" if there == 1 else f"cuda:0 to cuda:{there - 1}"
            raise UserError(f"--device {device}: there {'is' if there == 1 else 'are'} {names} ({there} in all)")
    elif number >= there:
        raise UserError(f"--nproc_per_node is {processes.local_size()}, but there are {there} GPUs; start one for each")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def say(message: str) -> None:
    """A line to the user, on stderr, where there still is one; of several processes on a machine the first speaks."""
    if processes.local_rank() == 0 and sys.stderr:
        try:
            print(message, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # the terminal hung up; closed
            _silence(sys.stderr)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let the script go on where its stdout or stderr goes away: `| head`, a terminal that hangs up, a full disk.

    What it makes is in files: for the sake of a line nobody reads, no work is lost. When stdout goes, stderr says so.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets that number, which else the next file would, and be written to
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream like the one it is made from, which falls silent where that one can't be written any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._end(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        _silence(self._stream)
        if self is sys.stdout:
            say(f"stdout is gone ({error.strerror or error}): going on without it")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _silence(stream: TextIO) -> None:
    """Send what is still in the stream's buffer, and all that is yet to come, nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file below it, or a closed one
        pass


def compiled(network: torch.nn.Module, shape: tuple[int, ...], runtime: Runtime) -> Callable[[torch.Tensor], tuple]:
    """The network compiled for images of that shape, channels last; images of another shape go to the network itself.

    Tried out here, on images of zeros, that nothing may fail later; where it fails, a line on stderr and the network.
    """
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    fast = torch.compile(network, dynamic=False)
    try:
        with runtime.autocast():
            images = torch.zeros(shape, device=runtime.device).to(memory_format=torch.channels_last)
            fast(images)[0].sum().backward()  # to try the backward pass any output will do: the first is always there
    except Exception as error:  # a compiler can fail in any way
        reason = str(error).strip().partition("\n")[0]
        say(f"torch.compile failed ({type(error).__name__}: {reason}); going on without it")
        fast = network
    finally:
        # The trial was none of the training's: its gradients and its batch norm statistics go.
        network.zero_grad()
        for name, value in network.named_buffers():
            value.copy_(buffers[name])
    return lambda images: fast(images) if images.shape == shape else network(images)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on the device now; 0 where that can't be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def begin_peak_memory(device: torch.device) -> None:
    """Let peak_memory begin anew; on a CPU, where the system can't do so, it goes on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak resident size


def peak_memory(device: torch.device) -> int:
    """Bytes that this process took at most: of a GPU those allocated by torch; else all that it had resident.

    0 where that can't be known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def inference_batch(device: torch.device) -> int:
    """How many images to a batch where nothing is learnt: enough to fill the device, few enough to fit it."""
    return 1000 if device.type == "cuda" else 250


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for it.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
