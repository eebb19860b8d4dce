"""Device, precision, compilation, and what is said."""

import argparse
import copy
import os
import platform
import resource
import socket
import sys
from datetime import timedelta

import pytest
import torch
from as_processes import FORKS, environments
from torch import nn

import cli
from outputs import Outputs
from util import processes, runtime
from util.processes import Processes
from util.runtime import Runtime, UserError

CPU = torch.device("cpu")


class Small(nn.Module):
    """A network quick to compile."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, images):
        return Outputs(logits=self.fc(self.bn(self.conv(images)).relu().mean((2, 3))))


def test_fp32_on_the_cpu():
    assert runtime.choose("cpu", "fp32") == Runtime(CPU, "fp32")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_auto_takes_bf16_where_the_device_computes_in_it(monkeypatch):
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(runtime, "_computes_in_bf16", lambda device, has=has: has)
        assert runtime.choose("cpu", "auto").precision == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "xpu", "xpu:1"])
def test_an_accelerator_that_is_not_there(gpus, device):
    gpus(0)
    words = f"no {device[:4].strip(':').upper()} device is available here; use --device cpu"
    with pytest.raises(UserError, match=f"--device {device}: {words}"):
        runtime.choose(device)
    gpus(1, "mps" if device.startswith("xpu") else "xpu")  # another one is
    with pytest.raises(UserError, match=f"--device {device}: {words}"):
        runtime.choose(device)
    assert runtime.choose("cpu").device == CPU


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many accelerators of a kind: gpus(2, "xpu"). Gives the numbers that were set."""
    taken = []

    def pretend(n, kind="cuda"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: n)
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(module, "set_device", taken.append)
            monkeypatch.setattr(module, "is_bf16_supported", lambda **options: True)
        return taken

    return pretend


def test_a_gpu_by_its_number(gpus, monkeypatch):
    for kind in ("cuda", "xpu"):
        taken = gpus(2, kind)
        taken.clear()
        for device, number in (("auto", 0), (kind, 0), (f"{kind}:0", 0), (f"{kind}:1", 1)):
            assert runtime.choose(device) == Runtime(torch.device(kind, number), "bf16")
        assert taken == [0, 0, 0, 1]
    gpus(2)
    with pytest.raises(UserError, match=r"--device cuda:7: there are cuda:0 to cuda:1 \(2 in all\)"):
        runtime.choose("cuda:7")
    gpus(1)
    with pytest.raises(UserError, match=r"--device cuda:1: there is only cuda:0"):
        runtime.choose("cuda:1")
    set_all(monkeypatch, environments(2)[0])
    with pytest.raises(UserError, match="--device cuda:0: under torchrun .* use --device cuda"):
        runtime.choose("cuda:0")


def set_all(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_processes_and_gpus(gpus, monkeypatch):
    gpus(1)
    set_all(monkeypatch, environments(2)[1])
    with pytest.raises(UserError, match="--nproc_per_node is 2, but there is 1 GPU; start one for each"):
        runtime.choose("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    gpus(1, "mps")  # two machines of one each
    with pytest.raises(UserError, match="mps devices can't work as several processes here; start one, or use --device"):
        runtime.choose("mps")


TOGETHER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({**TOGETHER, "MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', not a whole number from 1 on; .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not"),
        ({"LOCAL_RANK": "\x1b[31mx"}, r"LOCAL_RANK is '\\x1b\[31mx', not a whole number from 0 on"),
        ({"RANK": "-1"}, "RANK is '-1', not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but WORLD_SIZE is not set"),
        ({**TOGETHER, "RANK": "5"}, "RANK is 5, but WORLD_SIZE is 2; .* unset RANK WORLD_SIZE"),
        ({**TOGETHER, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is 2, but WORLD_SIZE is not set"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
        ({**TOGETHER, "MASTER_PORT": "x"}, "MASTER_PORT is 'x', not a port"),
        ({**TOGETHER, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000', not a port"),
    ],
)
def test_wrong_variables_of_torchruns(monkeypatch, environment, words):
    set_all(monkeypatch, environment)
    assert processes.local_rank() == 0 and processes.size() == 1  # and so the error is heard
    with pytest.raises(UserError, match=words):
        runtime.choose("cpu")


@pytest.mark.parametrize("rank, taken, words", [(0, True, "address already in use"), (0, False, "1/2"), (1, False, "")])
def test_processes_that_do_not_meet(monkeypatch, capfd, rank, taken, words):
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    set_all(monkeypatch, environments(2)[rank])
    with socket.socket() as other:
        if taken:
            other.bind(("", int(os.environ["MASTER_PORT"])))
            other.listen()
        with pytest.raises(UserError, match=f"can't meet the 2 processes of WORLD_SIZE at MASTER_ADDR.*{words}.*unset"):
            runtime.choose("cpu")
    assert capfd.readouterr().err == ""


def test_what_tensors_travel_by(monkeypatch):
    there = {"nccl", "gloo"}
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name in there)
    assert [processes.backend(kind) for kind in ("cuda", "xpu", "mps", "cpu")] == ["nccl", None, None, None]
    there.add("xccl")
    assert processes.backend("xpu") == "xccl"


def test_an_apple_gpu(gpus):
    gpus(1, "mps")
    for name in ("auto", "mps"):
        assert runtime.choose(name) == Runtime(torch.device("mps", 0), "fp32")
    assert runtime.choose("mps").describe().endswith(", mps")


def test_bf16_where_it_is_not(monkeypatch):
    monkeypatch.setattr(runtime, "_stands_bf16", lambda device: False)
    with pytest.raises(UserError, match="--precision bf16: cpu can't compute in it here; use --precision fp32, or"):
        runtime.choose("cpu", "bf16")
    assert runtime.choose("cpu", "fp32").precision == "fp32"


def test_names_of_devices():
    for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps", "xpu", "xpu:1"):
        assert runtime.device_name(name) == name
    wrong = [
        "mps:0",
        "xpu:",
        "gpu",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "cuda:1.0",
        "CUDA",
        "cpu:0",
        "",
        "cuda:\u0661",
        "cuda:" + "1" * 400,
    ]
    for name in wrong:
        with pytest.raises(
            argparse.ArgumentTypeError, match="is not auto, cpu, mps, cuda, cuda:N, xpu or xpu:N"
        ) as raised:
            runtime.device_name(name)
        assert len(str(raised.value)) < 140


def test_autocast_is_that_of_the_precision():
    a = torch.ones(2, 2)
    for precision, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with Runtime(CPU, precision).autocast():
            assert (a @ a).dtype == kind


def test_free_memory():
    assert runtime.free_memory(CPU) > 1 << 20


def step(network, forward, images):
    network.zero_grad()
    logits = forward(images).logits
    logits.square().sum().backward()
    return [logits, *(p.grad for p in network.parameters()), *(b.float() for b in network.buffers())]


def test_compiled_computes_the_same_and_leaves_no_trace():
    network = Small()  # which seeds the images, too
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    forward = runtime.compiled(network, (4, 3, 8, 8), Runtime(CPU, "fp32"))
    assert all(value.equal(plain.state_dict()[name]) for name, value in network.state_dict().items())
    assert list(network.state_dict()) == list(plain.state_dict())  # no prefix of the compiler's
    for _ in range(2):
        for given, expected in zip(step(network, forward, images), step(plain, plain, images), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(images[:3]).logits, plain(images[:3]).logits)  # the last short batch


class Wrong(torch.autograd.Function):
    """The identity, with half the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "dropout", "told"),
    [
        (lambda x: x * (1 + 1e-6), 0, ""),
        (lambda x: x, 0.3, ""),
        (lambda x: x * 1.5, 0, "gives other outputs (by 50 %)"),
        (lambda x: x * float("nan"), 0, "gives other outputs (by nan %)"),
        (lambda x: x * 20, 0.3, "gives other outputs"),
        (Wrong.apply, 0, "gives other gradients (by 50 %)"),
    ],
)
def test_what_is_compiled_wrongly_is_not_used(monkeypatch, capfd, precision, change, dropout, told):
    class Dropping(Small):
        def forward(self, images):
            return Outputs(logits=nn.functional.dropout(super().forward(images).logits, dropout))

    network = Dropping()
    monkeypatch.setattr(torch, "compile", lambda *args, **options: lambda x: Outputs(change(network(x).logits)))
    state, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    forward = runtime.compiled(network, (4, 3, 8, 8), Runtime(CPU, precision))
    assert torch.get_rng_state().equal(random) and all(value.grad is None for value in network.parameters())
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())
    err = capfd.readouterr().err
    assert forward.compiled == (not told) and told in err and len(err.splitlines()) == bool(told)


def test_all_processes_go_on_alike(monkeypatch, capfd):
    class Others(Processes):
        def all_reduce_max(self, number):
            return 1

    monkeypatch.setattr(torch, "compile", lambda network, **options: network.forward)
    forward = runtime.compiled(Small(), (4, 3, 8, 8), Runtime(CPU, "fp32", Others(0, 2)))
    assert not forward.compiled
    assert capfd.readouterr().err == "torch.compile failed in another process; going on without it\n"


@pytest.mark.skipif(not hasattr(torch.compiler, "config"), reason="needs its cache_key_tag")
def test_what_is_compiled_is_kept_by_instruction_set(monkeypatch):
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "mine")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    monkeypatch.setattr(torch, "compile", lambda network, **options: network.forward)
    for _ in range(2):
        runtime.compiled(Small(), (4, 3, 8, 8), Runtime(CPU, "fp32"))
    assert torch.compiler.config.cache_key_tag == "mineAVX1024"


def test_what_is_compiled_is_tried_out_by_its_first_output(monkeypatch, capfd):
    tried = []

    def compiler(network, **options):
        return lambda images: tried.append(images.shape) or network(images)

    monkeypatch.setattr(torch, "compile", compiler)
    runtime.compiled(Small(), (4, 3, 8, 8), Runtime(CPU, "fp32"))
    assert tried == [(4, 3, 8, 8)] and capfd.readouterr().err == ""


def test_a_compiler_that_fails_is_no_failure(monkeypatch, capfd):
    def broken(network, **options):
        def call(images):
            raise RuntimeError("no compiler here\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    network, images = Small(), torch.randn(4, 3, 8, 8)
    forward = runtime.compiled(network, (4, 3, 8, 8), Runtime(CPU, "fp32"))
    assert forward(images).logits.equal(network(images).logits)
    err = capfd.readouterr().err
    assert err == "torch.compile failed (RuntimeError: no compiler here); going on without it\n"


def faults(chosen, result):
    """Send the pages that two training steps, after two others, had mapped in."""
    torch.set_num_threads(1)
    if chosen:
        runtime.choose("cpu")
    layers = (nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(2))
    network, images = nn.Sequential(*layers), torch.zeros(576, 16, 32, 32)  # maps of 36 MiB: blocks of 32 would be kept
    counts = []
    for _ in range(4):
        network(images).sum().backward()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    result.send(counts[3] - counts[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_uses_the_memory_of_the_step_before():
    pages = {chosen: in_a_process(faults, chosen) for chosen in (True, False)}
    # Not none: what is freed may lie between small blocks, too short by a few bytes for the next.
    assert pages[True] < pages[False] / 8


def in_a_process(function, *args):
    """What the function sends from a process of its own."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=function, args=(*args, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    assert process.exitcode == 0
    return result


# what is said


def print_to_nobody(name, full, result):
    """Print to a stream whose other end is gone, or whose disk is full, and send what the other stream was told."""
    number, other = (1, 2) if name == "stdout" else (2, 1)
    reader, writer = os.pipe()
    unread, gone = os.pipe()
    os.close(unread)
    if full:
        gone = os.open("/dev/full", os.O_WRONLY)
    os.dup2(gone, number)
    os.dup2(writer, other)
    os.close(writer)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    with runtime.lasting_output():
        for _ in range(3):
            print("a line", flush=True)
            runtime.say("a note")
        print("not flushed")
    os.dup2(os.open(os.devnull, os.O_WRONLY), other)
    result.send(os.read(reader, 10000).decode())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("full", [False, True])
def test_output_that_goes_away_stops_nothing(full):
    told = in_a_process(print_to_nobody, "stdout", full)
    assert told.count("a note\n") == 3 and told.count("stdout is gone") == 1 and "going on without it" in told
    assert in_a_process(print_to_nobody, "stderr", full) == "a line\n" * 3 + "not flushed\n"


def print_to_closed(result):
    for number in range(3):
        os.close(number)
    sys.stdout = sys.stderr = None  # so does Python where they are closed from the start
    with runtime.lasting_output():
        print("a line", flush=True)
        runtime.say("a note")
        sys.stderr.write("of a bar")
        opened = os.open(os.devnull, os.O_RDONLY)
    result.send(opened)


def test_no_file_takes_the_place_of_a_closed_stderr():
    assert in_a_process(print_to_closed) > 2


def test_say_without_a_stderr(monkeypatch, capsys):
    with open(os.devnull) as unwritable:
        for stderr in (None, unwritable):
            monkeypatch.setattr(sys, "stderr", stderr)
            runtime.say("a note")
    assert capsys.readouterr().out == ""


def test_a_time_is_taken_when_any_accelerator_is_done(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = [torch.device(name) for name in ("cuda:1", "mps", "xpu")]
    for device in (CPU, *devices):
        runtime.synchronize(device)
    assert waited == devices


def test_control_characters_are_said_as_escapes(capsys):
    runtime.say("a\x1b[2J\rb\nc\td\x07\x9b\u202e\udce9\ud800é")
    assert capsys.readouterr().err == "a\\x1b[2J\\rb\\nc\\td\\x07\\x9b\\u202e\\xe9\\ud800é\n"


def print_in(encoding, result):
    """Print a letter that no such encoding has, and send what came of it."""
    reader, writer = os.pipe()
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding=encoding) for number in (1, 2))
    with runtime.lasting_output():
        print("日", flush=True)
        runtime.say("日")
    for number in (1, 2):
        os.close(number)
    result.send(os.read(reader, 1000))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_letter_that_the_encoding_lacks_is_an_escape(encoding):
    assert in_a_process(print_in, encoding) == b"\\u65e5\n" * 2


# memory


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError(), "CPU"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "CPU",
        ),
        (OSError(12, "Cannot allocate memory"), "CPU"),
        (RuntimeError("can't start new thread"), "CPU"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "GPU"),
    ],
)
def test_out_of_memory_is_a_line_with_the_cure(error, where, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"out of memory on the {where} (" in err and err.count("\n") == 1
    assert "a smaller --batch_size or --image_size" in err and ("--stream" in err) == (where == "CPU")


def test_another_error_is_no_lack_of_memory():
    for error in (RuntimeError("size mismatch"), ValueError("can't allocate"), None):
        assert not runtime.is_out_of_memory(error)


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/", {f"{V2}/memory.max": "1000", f"{V2}/memory.current": "300"}, [700]),
        ("0::/", {f"{V2}/memory.max": "max", f"{V2}/memory.current": "300"}, []),
        ("0::/", {f"{V2}/memory.max": "1000", f"{V2}/memory.current": "3000"}, [1]),
        (
            "0::/a/b",
            {f"{V2}/a/b/memory.max": "max", f"{V2}/a/b/memory.current": "9"}
            | {f"{V2}/a/memory.max": "500", f"{V2}/a/memory.current": "100", f"{V2}/a/memory.stat": "inactive_file 60"},
            [460],
        ),
        (
            "1:cpu:/x\n4:memory:/docker/abc",  # a name that the container itself does not see
            {f"{V1}/memory.limit_in_bytes": "2000", f"{V1}/memory.usage_in_bytes": "500"}
            | {f"{V1}/memory.stat": "cache 400\ntotal_inactive_file 300"},
            [1800],
        ),
        ("1:cpu:/x", {f"{V2}/memory.max": "1000", f"{V2}/memory.current": "300"}, []),
        ("0::/", {f"{V2}/memory.max": "nonsense", f"{V2}/memory.current": "300"}, []),
        (None, {}, []),
    ],
)
def test_a_containers_limit_is_the_memory_there_is(tmp_path, monkeypatch, groups, files, left):
    for name, content in {**files, "proc/self/cgroup": groups}.items():
        if content:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")
    found = list(runtime._left_in_containers(tmp_path))
    assert found == left
    monkeypatch.setattr(runtime, "_left_in_containers", lambda: found)
    assert runtime.free_memory(CPU) == (left[0] if left else pytest.approx(runtime.free_memory(CPU), rel=0.5))
