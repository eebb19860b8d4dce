"""What a run runs on: device, precision, processes; what it says; and the exceptions that end it with one line."""

import argparse
import ctypes
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TextIO

import torch

from util import processes
from util.processes import NotJoined, Processes
from util.text import printable


class UserError(Exception):
    """A mistake of the user's, as one line that says what is wrong and what to do. Scripts print it and exit with 2."""


class Unsuited(UserError):
    """What was asked for can't be had here, though others of its kind can: of several, it may be left out."""


# What libraries say where memory is missing: torch on a CPU, CUDA and its libraries, MPS, a system call.
NO_MEMORY = r"can.?t allocate|cannot allocate|not enough memory|out of memory|ALLOC_FAILED|std::bad_alloc|new thread"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error says that there is not the memory that was asked for, of a CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(re.search(NO_MEMORY, str(error), re.IGNORECASE))


def memory_line(error: BaseException) -> str:
    """What to tell the user of such an error: what was asked for, and what needs less."""
    gpu = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA|CUBLAS|CUDNN|HIP|XPU|MPS", str(error))
    reason = str(error).strip().partition("\n")[0][:200] or "no more can be had"
    cure = "a smaller --batch_size or --image_size needs less" + ("" if gpu else ", and so does --stream")
    return f"out of memory on the {'GPU' if gpu else 'CPU'} ({reason}); {cure}"


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
        if self.device.type == "cpu":
            return f"{_cpu_name()}, {torch.get_num_threads()} threads"
        name = getattr(torch.get_device_module(self.device), "get_device_name", None)
        return name(self.device) if name else f"{_cpu_name()}, {self.device.type}"


def device_name(text: str) -> str:
    """An argparse type, for --device: "auto", "cpu", "mps", "cuda" or "xpu", the last two also with a number, "cuda:N".

    Whether it is there is `choose`'s question.
    """
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?", text):
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise argparse.ArgumentTypeError(
            f"{shown} is not auto, cpu, mps, cuda, cuda:N, xpu or xpu:N (N is a GPU's number, from 0)"
        )
    return text


def choose(device: str = "auto", precision: str = "auto") -> Runtime:
    """The runtime for --device, see `device_name`, and --precision auto|fp32|bf16.

    auto takes the accelerator that torch finds, and bf16 where the device computes in it. What is in float32 is plain
    float32, never TF32. Under torchrun each process of a machine takes a GPU of its own. Raises UserError for an
    accelerator that is not there, or none of them left, for bf16 on a device that can't do it at all, and where the
    variables that torchrun sets are wrong or the other processes don't come.
    """
    there = accelerator()
    if device not in ("auto", "cpu") and device.partition(":")[0] != there:
        name = device.partition(":")[0].upper()
        raise UserError(f"--device {device}: no {name} device is available here; use --device cpu, or auto")
    chosen = torch.device("cpu") if device == "cpu" or there is None else _gpu(there, device)
    if precision == "auto":
        precision = "bf16" if _computes_in_bf16(chosen) else "fp32"
    elif precision == "bf16" and not _stands_bf16(chosen):
        raise UserError(f"--precision bf16: {chosen.type} can't compute in it here; use --precision fp32, or auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # cuDNN times its algorithms once for each shape: an epoch has two, the full batch and the last short one.
    torch.backends.cudnn.benchmark = True
    if chosen.type == "cpu":
        keep_freed_memory()
    try:
        return Runtime(chosen, precision, processes.join(chosen.type))
    except NotJoined as error:
        raise UserError(str(error)) from error


def accelerator() -> str | None:
    """The type of the accelerator that this torch can use here, "cuda", "mps", "xpu" ...; None where there is none."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None


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


def _gpu(kind: str, device: str) -> torch.device:
    """The GPU that --device names, else this process's; with its number, so that it equals its tensors' device."""
    number, there = processes.local_rank(), torch.accelerator.device_count()
    if ":" in device:
        number = int(device.partition(":")[2])
        if processes.local_size() > 1:
            raise UserError(f"--device {device}: under torchrun each process has a GPU of its own; use --device {kind}")
        if number >= there:
            names = f"only {kind}:0" if there == 1 else f"{kind}:0 to {kind}:{there - 1}"
            raise UserError(f"--device {device}: there {'is' if there == 1 else 'are'} {names} ({there} in all)")
    elif number >= there:
        gpus = "is 1 GPU" if there == 1 else f"are {there} GPUs"
        raise UserError(f"--nproc_per_node is {processes.local_size()}, but there {gpus}; start one for each")
    if processes.size() > 1 and not processes.backend(kind):
        raise UserError(f"{kind} devices can't work as several processes here; start one, or use --device cpu")
    if kind != "mps":  # of which there is one
        torch.get_device_module(kind).set_device(number)
    return torch.device(kind, number)


# What a device can do is asked of it, by doing it once: torch tells of few such things.


@cache
def widest(device: torch.device) -> torch.dtype:
    """The most exact floating point type that the device has: float64, or float32, as on MPS and on some of Intel's."""
    try:
        torch.ones(1, dtype=torch.float64, device=device) + 1
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


@cache
def has_fused(optimiser: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Whether this optimiser of torch's can do its whole step on the device in one piece, as its option fused=True."""
    weight = torch.nn.Parameter(torch.zeros(1, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        optimiser([weight], lr=0.0, fused=True).step()
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


@cache
def takes_pinned_memory(device: torch.device) -> bool:
    """Whether tensors go to the device faster from page-locked memory, nobody waiting for them."""
    # Of the CPU's own memory nothing is sent. On MPS it is the same memory, and a copy that nobody waits for may read
    # it when it is another tensor's already (https://github.com/pytorch/pytorch/issues/189690).
    if device.type in ("cpu", "mps"):
        return False
    try:
        torch.zeros(1).pin_memory().to(device, non_blocking=True)
    except RuntimeError:
        return False
    return True


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, on the CPU, sent to the device; nobody waits until it has arrived where the device allows that."""
    if takes_pinned_memory(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def say(message: str) -> None:
    """A line to the user, on stderr, where there still is one; of several processes on a machine the first speaks.

    Control characters in it, which names of files and classes may have, are escaped.
    """
    if processes.local_rank() == 0:
        say_alone(message)


def say_alone(message: str) -> None:
    """The same of whichever process."""
    if sys.stderr:
        try:
            print(printable(message), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # the terminal hung up; closed
            _silence(sys.stderr)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let the script go on where its stdout or stderr goes away: `| head`, a terminal that hangs up, a full disk.

    What it makes is in files: for the sake of a line nobody reads, no work is lost. When stdout goes, stderr says so.
    A letter that their encoding lacks is written as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets that number, which else the next file would, and be written to
    before = sys.stdout, sys.stderr
    for stream in filter(None, before):
        with suppress(AttributeError, ValueError):  # another kind of stream; closed
            stream.reconfigure(errors="backslashreplace")
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


def compiled(
    network: torch.nn.Module, shape: tuple[int, ...], runtime: Runtime, *, trained: bool = True
) -> Callable[[torch.Tensor], tuple]:
    """The network compiled for images of that shape, channels last; images of another shape go to the network itself.

    trained: it is asked for gradients. It is tried out here on random images. Where it fails in one of the processes,
    or differs from the network by more than rounding, all go on with the network itself, and say so on stderr.
    """
    _keep_instruction_sets_apart()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    fast, problem = torch.compile(network, dynamic=False), ""
    kind = runtime.device.type
    try:
        with torch.random.fork_rng([runtime.device] if kind in ("cuda", "xpu") else [], device_type=kind):
            problem = _unlike(fast, network, shape, runtime, trained)
    except Exception as error:  # a compiler can fail in any way
        reason = str(error).strip().partition("\n")[0]
        problem = f"failed ({type(error).__name__}: {reason})"
    finally:
        # The trial was none of the training's: its batch norm statistics go.
        for name, value in network.named_buffers():
            value.copy_(buffers[name])
    if runtime.processes.all_reduce_max(bool(problem)):
        say(f"torch.compile {problem or 'failed in another process'}; going on without it")
        fast = network

    def forward(images: torch.Tensor) -> tuple:
        return fast(images) if images.shape == shape else network(images)

    forward.compiled = fast is not network
    return forward


def _keep_instruction_sets_apart() -> None:
    """Let torch.compile's cache on the disk know for which instruction set its code is.

    PyTorch 2.14 takes a graph from there that was compiled for vectors of another length (ATEN_CPU_CAPABILITY, a folder
    that several machines share), and then compiles its loops for this one: they skip values, or write beyond arrays.
    """
    config, name = getattr(torch.compiler, "config", None), torch.backends.cpu.get_cpu_capability()
    if hasattr(config, "cache_key_tag") and name not in config.cache_key_tag:
        config.cache_key_tag += name


def _unlike(
    fast: Callable[[torch.Tensor], tuple],
    network: torch.nn.Module,
    shape: tuple[int, ...],
    runtime: Runtime,
    trained: bool,
) -> str:
    """What is wrong with the outputs and the gradients of the compiled network, on random images; "" if nothing is.

    How much rounding matters differs with the network: much in a deep one with batch norm. So the network itself is
    asked again, with rounding errors in the images, and other random numbers for its dropout.
    """
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn((2, *shape), generator=generator).to(runtime.device)
    rounding, least = (2**-8, 0.03) if runtime.precision == "bf16" else (2**-22, 0.001)
    weights = [value for value in network.parameters() if trained and value.requires_grad]

    def results(forward: Callable[[torch.Tensor], tuple], images: torch.Tensor) -> list[torch.Tensor]:
        with runtime.autocast(), torch.set_grad_enabled(trained), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # float32 is meant to be plain
            output = forward(images.to(memory_format=torch.channels_last))[0]  # the first is always there
        if not weights:
            return [output.float()]
        gradients = torch.autograd.grad(output.float().square().sum(), weights, allow_unused=True)
        gradients = [gradient.float().flatten() for gradient in gradients if gradient is not None]
        return [output.detach().float(), torch.cat(gradients)]

    given, expected = results(fast, images), results(network, images)
    again = results(network, images * (1 + rounding * noise.sign()))
    for name, a, b, c in zip(("outputs", "gradients"), given, expected, again, strict=False):
        # Of a ResNet-20 compiled changes 0.6 to 3 times as much as asking again; wrong code changed more than `least`.
        if not (a - b).norm() <= 8 * (c - b).norm() + least * b.norm():  # NaN, too
            return f"gives other {name} (by {100 * ((a - b).norm() / b.norm()).item():.2g} %)"
    return ""


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on the device now, within a container's limit; 0 where that can't be known."""
    module = torch.get_device_module(device)
    try:
        if device.type == "cpu":
            with open("/proc/meminfo") as lines:
                free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
            return min([free, *_left_in_containers()])
        if device.type == "mps":
            return max(0, module.recommended_max_memory() - module.driver_allocated_memory())
        return module.mem_get_info(device)[0]
    except (OSError, StopIteration, AttributeError, RuntimeError):
        return 0


def _left_in_containers(root: Path = Path("/")) -> Iterator[int]:
    """Bytes left of the memory limit of each control group that this process is in, 1 at least; none without limits.

    root: where the system's files are.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in groups:
        if not controllers:  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Within a container the name may be that outside of it, where its own folder is the mount itself.
        folder = mount / name.strip("/")
        for group in [folder, *folder.parents]:
            if group.is_relative_to(mount) and (left := _left_in(group, *names)):
                yield left


def _left_in(group: Path, limit: str, usage: str, cached: str) -> int | None:
    """Bytes left in the group, 1 at least; None without a limit. What is cached of files counts as left."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        with suppress(OSError, ValueError):
            told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used -= int(told.get(cached, 0))
    except (OSError, ValueError):  # not there; "max"
        return None
    return max(1, most - used)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


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
    return 250 if device.type in ("cpu", "mps") else 1000  # an Apple GPU's memory is the CPU's, of which there is less


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":  # where it can't be asked it is left to the user
        return getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)()
    # torch has no public question for it.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _stands_bf16(device: torch.device) -> bool:
    """Whether the device can compute in bf16 at all, be it slowly."""
    try:
        with torch.autocast(device.type, torch.bfloat16):
            a = torch.ones(1, 1, device=device)
            return (a @ a).dtype == torch.bfloat16
    except (TypeError, RuntimeError):
        return False


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
