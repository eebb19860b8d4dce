"""What a step costs with each loss, beside kd: python benchmarks/loss_cost.py --dataset cifar100

Times an epoch of --steps steps with every loss in turn, the teacher's outputs remembered, and again, --repeats times:
so each repeat has its own ratio to kd. Writes loss_cost.json, and RESULTS.md with it, beside itself.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from speed import HERE, write_results

import cli
import data
import engine
import jobs
import losses
import models
from data import Batches, Split
from recipes import Recipe
from teacher import Teacher
from util import graphs, runtime
from util.bounds import COUNT
from util.runtime import UserError, say


def main() -> None:
    parser = cli.Parser(description="Measure milliseconds a step of every loss as a ratio to kd.")
    parser.add_argument("--teacher_arch", type=cli.arch, default="resnet56")
    parser.add_argument("--student_arch", type=cli.arch, default="resnet20")
    parser.add_argument("--batch_size", type=cli.number(COUNT), default=64)
    parser.add_argument("--steps", type=cli.number(COUNT), default=10)
    parser.add_argument("--repeats", type=cli.number(COUNT), default=7)
    cli.add_data_flags(parser)
    args = parser.parse_args()
    chosen = runtime.choose(args.device, args.precision)
    dataset = cli.load_data(args, chosen)
    with tempfile.TemporaryDirectory() as folder:
        tasks = dict(prepared(args, dataset, chosen, Path(folder)))
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for repeat in range(args.repeats + 1):
            for name, run in tasks.items():
                started = time.perf_counter()
                run()
                if repeat:  # what comes first is slower
                    seconds[name].append(time.perf_counter() - started)
    ratios = {name: [own / kd for own, kd in zip(times, seconds["kd"], strict=True)] for name, times in seconds.items()}
    measured = {
        "command": " ".join(["benchmarks/loss_cost.py", *sys.argv[1:]]),
        "device": f"{chosen.describe()}; {chosen.precision}; torch {torch.__version__}",
        "pair": f"{args.teacher_arch} to {args.student_arch}, {dataset.image_size}x{dataset.image_size} pixels, "
        f"{dataset.num_classes} classes, batches of {args.batch_size}",
        "repeats": args.repeats,
        "milliseconds": {name: 1000 * statistics.median(times) / args.steps for name, times in seconds.items()},
        "ratio": {name: statistics.median(own) for name, own in ratios.items()},
        "spread": {name: [min(own), max(own)] for name, own in ratios.items()},
        "learns": [name for name, loss in losses.LOSSES.items() if loss.parts or loss.projects],
    }
    (HERE / "loss_cost.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_results()


def prepared(args: argparse.Namespace, dataset: data.Dataset, chosen: runtime.Runtime, folder: Path):
    """For the cross-entropy alone and each loss what runs an epoch with it; those that the pair can't have are told."""
    n = args.steps * args.batch_size
    index = torch.arange(n) % len(dataset.train.labels)
    split = Split(dataset.train.images[index], dataset.train.labels[index])
    batches = Batches(split, dataset.mean, dataset.std, args.batch_size, chosen.device, shuffle=True)

    def built(name: str) -> torch.nn.Module:
        torch.manual_seed(0)
        stem = models.stem_of(name, "auto", dataset.image_size)
        network = models.build(name, dataset.num_classes, stem)
        return network.to(chosen.device, memory_format=torch.channels_last)

    networks = {name: built(name) for name in (args.teacher_arch, args.student_arch)}
    settle(networks[args.teacher_arch], batches)
    teacher = Teacher(networks[args.teacher_arch], chosen, "benchmark", 0.0, cache_dir=folder, needs=["stages"])
    for name in (None, *losses.LOSSES):
        recipe = Recipe(name or "none", "", "student", 1, 1, soft=name, alpha=0.5, weight=None if name else 1.0)
        try:
            reuses = name and losses.LOSSES[name].reuses
            student = built(f"{args.student_arch}+{args.teacher_arch}") if reuses else networks[args.student_arch]
            training = training_of(recipe, student, batches, teacher if name else None, chosen, args.repeats + 1)
            yield name or "none", functools.partial(next, training)
        except UserError as error:
            say(f"{name} is left out: {error}")


@torch.no_grad()
def settle(network: torch.nn.Module, batches: Batches) -> None:
    """Give its batch norms the images' statistics, without which a fresh network's maps are too large to be kept."""
    network.train()
    for _ in range(5):
        for batch in batches.epoch(0):
            network(batch.images)


def training_of(
    recipe: Recipe,
    student: torch.nn.Module,
    batches: Batches,
    teacher: Teacher | None,
    chosen: runtime.Runtime,
    epochs: int,
) -> Iterator[dict]:
    """What trains the student, at each `next` for an epoch, at a learning rate that leaves it as it is."""
    source, objective = jobs.aim(recipe, student, teacher, batches)
    alpha = torch.full((epochs, len(batches)), 0.5)
    settings = {"alpha": alpha, "learning_rate": lambda epoch, iteration: 0.0, "runtime": chosen, "teacher": source}
    return engine.fit(student, batches, objective, graphs=graphs.possible(chosen), **settings)


if __name__ == "__main__":
    cli.run(main)
