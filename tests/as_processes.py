"""Run a script as torchrun starts it, changed as a test asks: as_processes.py CHANGES script.py flags ...

CHANGES, separated by commas: "frozen_bn" leaves batch norm in eval mode, so that a batch's parts do not depend on each
other; "die" kills process 1 at its twelfth step, unless torchrun has started it anew.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.modules.pop("test", None)

import models  # noqa: E402
from util import processes, runstate  # noqa: E402


def freeze_bn() -> None:
    train = models.CifarResNet.train

    def only_the_rest(self, mode=True):
        train(self, mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    models.CifarResNet.train = only_the_rest


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


torch.set_num_threads(1)
for change in sys.argv[1].split(","):
    {"frozen_bn": freeze_bn, "die": die, "none": lambda: None}[change]()
sys.argv = [str(ROOT / sys.argv[2]), *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
