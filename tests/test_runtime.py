"""Device, precision, compilation."""

import argparse
import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import engine
import jobs
import models
from data import Batches
from models import Outputs
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


def test_auto_takes_bf16_where_the_hardware_has_it(monkeypatch):
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(runtime, "_computes_in_bf16", lambda device, has=has: has)
        assert runtime.choose("cpu", "auto").precision == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_that_is_not_there():
    with pytest.raises(UserError, match="--device cuda: no CUDA device"):
        runtime.choose("cuda")


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


FAULTS = """
import resource, sys
import torch
from torch import nn
from util import runtime

if sys.argv[1] == "chosen":
    runtime.choose("cpu")
layers = (nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4))
network, images = nn.Sequential(*layers), torch.zeros(1024, 16, 32, 32)  # maps of 64 MiB
faults = []
for _ in range(10):
    network(images).sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_uses_the_memory_of_the_step_before():
    def faults(case: str) -> int:
        """Pages that eight training steps had mapped in, in a process of its own."""
        options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "check": True}
        return int(subprocess.run([sys.executable, "-c", FAULTS, case], **options).stdout)

    # Not none: what is freed may lie between small blocks, too short by a few bytes for the next.
    assert faults("chosen") < faults("plain") / 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_cuda_never_waits_for_the_device(digits):
    hardware = runtime.choose("cuda", "auto")
    network = models.build("student", 10).to(hardware.device, memory_format=torch.channels_last)
    batches = Batches(digits.train, digits.mean, digits.std, 256, hardware.device, shuffle=True, augment=True)
    loss = jobs.batch_loss(RECIPES["student"], network, None, batches)
    waited = []

    def watched(batch, epoch, iteration):
        torch.cuda.set_sync_debug_mode("error" if iteration else "default")
        waited.append(iteration)
        return loss(batch, epoch, iteration)

    epochs = engine.fit(network, batches, watched, lambda epoch: 1e-3, 1, hardware, "test")
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


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_names_of_devices(text):
    assert runtime.device_name(text) == text


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "0", ""])
def test_what_is_no_device_is_answered_with_what_is(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not auto, cpu, cuda or cuda:N"):
        runtime.device_name(text)


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--device cuda:7: there are cuda:0 to cuda:1 \(2 in all\)"):
        runtime.choose("cuda:7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each process has a GPU of its own"):
        runtime.choose("cuda:1")
