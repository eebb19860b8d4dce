"""Shared by the tests: the repo's modules, the digits, and the scripts as a user runs them. No network, no GPU."""

import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from as_processes import STARTED
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# In front: the standard library has a package `test` of its own.
sys.path.insert(0, str(ROOT))
sys.modules.pop("test", None)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup all that the tests start would ignore it

import checkpoint  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
from util import runtime  # noqa: E402


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family != socket.AF_UNIX:  # by which processes of this machine speak with each other
            refuse()
        connect(self, address)

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """A test that fails would leave behind one that trains for ever."""
    yield
    while STARTED:
        running = STARTED.pop()
        if running.poll() is None:
            running.kill()
            running.wait()


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def cpu():
    return runtime.choose("cpu", "fp32")


@pytest.fixture
def script(monkeypatch, tmp_path, capfd):
    """Run a script in this process, in an empty folder of its own: script("train.py", "--epochs", 1)."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args) -> Ran:
        monkeypatch.setattr(sys, "argv", [str(ROOT / name), *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return Ran(ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def process(tmp_path):
    """Start a script in a process of its own, in an empty folder."""

    def start(name: str, *args, **options) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        STARTED.append(subprocess.Popen(command, **{**pipes, **options}))
        return STARTED[-1]

    return start


@pytest.fixture(scope="session")
def scaled_like_trained():
    """Give a network's batch norms statistics and weights as training leaves them: none at its default."""

    def change(network: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(3)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                n = module.num_features
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                module.weight.data.copy_(torch.rand(n, generator=generator) * 0.6 + 0.1)
                module.bias.data.copy_(torch.randn(n, generator=generator) * 0.1)
        return network

    return change


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder of 4 classes of small noise images, 10 each for training and 3 for testing, as flags for a script."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("test", 3)):
        for label in range(4):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 256, (8, 8, 3)) // 2 + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    return ["--dataset", "folder", "--data_dir", root, "--image_size", 8, "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory, scaled_like_trained):
    """A checkpoint of a teacher of 4 classes."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "resnet50.pth"
    checkpoint.save(scaled_like_trained(models.build("teacher", 4)), path)
    return path


@pytest.fixture(scope="session")
def light(tmp_path_factory, scaled_like_trained):
    """Flags of a teacher of 4 classes and a student that take little time, for what is the same for any networks."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("light") / "resnet20.pth"
    checkpoint.save(scaled_like_trained(models.build("resnet20", 4)), path)
    return ["--teacher", path, "--teacher_arch", "resnet20", "--student_arch", "resnet20"]
