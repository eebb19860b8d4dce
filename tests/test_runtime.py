"""Device, precision, compilation, and what is said."""

import argparse
import copy
import os
import platform
import resource
import sys

import pytest
import torch
from as_processes import FORKS
from torch import nn

import engine
import jobs
import models
from data import Batches
from outputs import Outputs
from recipes import RECIPES
from util import runtime
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_that_is_not_there(device):
    with pytest.raises(UserError, match=f"--device {device}: no CUDA device is available here; use --device cpu"):
        runtime.choose(device)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs."""

    def pretend(n):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)

    return pretend


def test_a_gpu_by_its_number(gpus, monkeypatch):
    gpus(2)
    for device, number in (("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)):
        assert runtime.choose(device) == Runtime(torch.device("cuda", number), "bf16")
    with pytest.raises(UserError, match=r"--device cuda:7: there are cuda:0 to cuda:1 \(2 in all\)"):
        runtime.choose("cuda:7")
    gpus(1)
    with pytest.raises(UserError, match=r"--device cuda:1: there is only cuda:0"):
        runtime.choose("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:0: under torchrun .* use --device cuda"):
        runtime.choose("cuda:0")


def test_names_of_devices():
    for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:11"):
        assert runtime.device_name(name) == name
    wrong = ["gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1.0", "CUDA", "cpu:0", "", "cuda:\u0661", "cuda:" + "1" * 400]
    for name in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="is not auto, cpu, cuda or cuda:N") as raised:
            runtime.device_name(name)
        assert len(str(raised.value)) < 120


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
    network, images = Small(), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    forward = runtime.compiled(network, (4, 3, 8, 8), Runtime(CPU, "fp32"))
    assert all(value.equal(plain.state_dict()[name]) for name, value in network.state_dict().items())
    assert list(network.state_dict()) == list(plain.state_dict())  # no prefix of the compiler's
    for _ in range(2):
        for given, expected in zip(step(network, forward, images), step(plain, plain, images), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(images[:3]).logits, plain(images[:3]).logits)  # the last short batch


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
    assert pages[True] < pages[False] / 20


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_cuda_never_waits_for_the_device(digits):
    chosen = runtime.choose("cuda", "auto")
    network = models.build("student", 10).to(chosen.device, memory_format=torch.channels_last)
    batches = Batches(digits.train, digits.mean, digits.std, 256, chosen.device, shuffle=True, augment=True)
    loss = jobs.batch_loss(RECIPES["student"], network, None, batches)
    waited = []

    def watched(batch, epoch, iteration):
        torch.cuda.set_sync_debug_mode("error" if iteration else "default")
        waited.append(iteration)
        return loss(batch, epoch, iteration)

    epochs = engine.fit(network, batches, watched, lambda epoch: 1e-3, 1, chosen, "test")
    try:
        next(epochs)
    except RuntimeError as error:
        # The epoch's end reads the figures; by then every step has run.
        assert waited[-1] == len(batches) - 1, error
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_order_on_cuda_is_that_on_the_cpu(digits):
    def order(device):
        batches = Batches(digits.train, digits.mean, digits.std, 256, device, shuffle=True, augment=True)
        return [(batch.index.cpu(), batch.images.cpu()) for batch in batches.epoch(2)]

    for (i, a), (j, b) in zip(order(CPU), order(torch.device("cuda")), strict=True):
        assert i.equal(j)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
