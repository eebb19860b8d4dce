"""What computes: the code's commit, and the versions of the libraries and of the GPU's software."""

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy
import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 5  # seconds


@cache
def commit() -> tuple[str | None, bool | None]:
    """The commit of the code and whether a tracked file differs from it; None, None outside a git checkout of it."""
    if not (ROOT / ".git").exists():  # else git would answer for a repository around this folder
        return None, None
    described = _answer(["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"])
    found = re.fullmatch(r"([0-9a-f]{40,64})(-dirty)?", described)
    return (found[1], found[2] is not None) if found else (None, None)


def versions() -> dict[str, str]:
    """Of Python and the libraries; where torch was built for CUDA and finds it, of CUDA, cuDNN and the driver too."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a type of its own, which no state may hold
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        **(_cuda() if torch.cuda.is_available() else {}),
    }


@cache
def _cuda() -> dict[str, str]:
    found = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}
    return {name: str(version) for name, version in found.items() if version}


def _driver() -> str:
    """The version of NVIDIA's driver; "" where it is not known."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def _answer(command: list[str]) -> str:
    """What the command prints; "" where it is not installed, fails or takes long."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
