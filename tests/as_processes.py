"""Scripts as processes of their own, forked from one that has imported torch already: each starts in no time.

As a script it is what torchrun starts: as_processes.py CHANGES script.py flags ... CHANGES, separated by commas:
"thin" makes all networks thin; "frozen_bn" leaves batch norm in eval mode, so that a batch's parts do not depend on
each other; "die" kills process 1 at its twelfth step, unless torchrun has started it anew; "fail" has it meet a user's
mistake at its third; "nohup" ignores SIGHUP.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer

import torch
from torchvision.models.resnet import ResNet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.modules.pop("test", None)

import models  # noqa: E402
from util import processes, runstate  # noqa: E402
from util.runtime import UserError  # noqa: E402

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision"])


STARTED: list["Started"] = []  # of the test that runs, see conftest.py


class Started:
    """A process, as subprocess.Popen has it. together: its stderr is its stdout."""

    def __init__(self, *args, cwd: Path, changes: str = "thin", together: bool = False, **environment):
        self._err = None if together else Path(tempfile.mkstemp(dir=cwd, prefix="stderr")[1])
        ours, its = FORKS.Pipe(duplex=False)
        command = [changes, *map(str, args)]
        everything = {**os.environ, **{key: str(value) for key, value in environment.items()}}
        self._process = FORKS.Process(target=_child, args=(command, cwd, its, self._err, everything))
        self._process.start()
        STARTED.append(self)
        its.close()
        self.stdout = os.fdopen(os.dup(ours.fileno()))
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        timer = Timer(timeout, self.kill)
        timer.start()
        out = self.stdout.read()
        self._process.join()
        timer.cancel()
        return out, self._err.read_text() if self._err else ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def join(self, timeout: float = 60) -> None:
        self._process.join(timeout)

    def kill(self) -> None:
        self._process.kill()

    wait = join


def as_torchrun(n: int, *args, cwd: Path, **options) -> list[Started]:
    """The script as n processes of one run, as torchrun starts them."""
    return [Started(*args, cwd=cwd, **one, **options) for one in environments(n)]


def environments(n: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each of n processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{key: str(value) for key, value in {**run, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(n)]


def _child(command: list[str], cwd: Path, out: Connection, err: Path | None, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(out.fileno(), 1)
    out.close()
    os.dup2(1 if err is None else os.open(err, os.O_WRONLY), 2)
    # As those of a new process: multiprocessing's own are others.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    run(*command)


def run(changes: str, script: str, *args: str) -> None:
    """Run the script in this process, changed."""
    torch.set_num_threads(1)
    for change in changes.split(","):
        {"thin": thin, "frozen_bn": freeze_bn, "die": die, "fail": fail, "nohup": nohup}[change]()
    sys.argv = [str(ROOT / script), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def thin(change=setattr) -> None:
    """Give all networks an eighth of their channels, where the network does not matter; `change` as setattr."""
    make, init = ResNet._make_layer, ResNet.__init__

    def with_thin_head(self, *args, **options):
        init(self, *args, **options)
        self.fc = torch.nn.Linear(self.inplanes, 1)

    change(
        ResNet,
        "_make_layer",
        lambda self, block, planes, *rest, **options: make(self, block, planes // 8, *rest, **options),
    )
    change(ResNet, "__init__", with_thin_head)
    for name in ("STUDENT_MAP", "TEACHER_MAP"):
        change(models, name, getattr(models, name) // 8)


def freeze_bn() -> None:
    train = models.CifarResNet.train

    def only_the_rest(self, mode=True):
        train(self, mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    models.CifarResNet.train = only_the_rest


def nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def die() -> None:
    average, steps = processes.Processes.average_gradients, []

    def once(self, network, share):
        steps.append(share)
        if len(steps) == 12 and self.rank == 1 and not processes.restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        average(self, network, share)

    processes.Processes.average_gradients = once
    # Which state is there at the death must not depend on the disk's speed: each is written before the run goes on.
    save = runstate.Keeper.save

    def save_and_wait(self, state):
        save(self, state)
        self._failed()

    runstate.Keeper.save = save_and_wait


def fail() -> None:
    average, steps = processes.Processes.average_gradients, []

    def once(self, network, share):
        steps.append(share)
        if len(steps) == 3 and self.rank == 1:
            raise UserError("an image of mine is damaged")
        average(self, network, share)

    processes.Processes.average_gradients = once
    processes.ENDING = 0.0


if __name__ == "__main__":
    run(*sys.argv[1:])
