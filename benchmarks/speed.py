"""How fast this project is, beside a textbook loop on the same images.

    python benchmarks/speed.py --dataset folder --data_dir my_images

Measures images/s of training the teacher and the student, of distilling (logits; feature maps) and of testing, in
alternating repeats; the share of the roofline; peak memory; and how seconds and memory grow with the number of images
and of students. Writes speed.json, RESULTS.md and speed.png beside itself.
"""

import argparse
import ctypes
import functools
import json
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cli  # noqa: E402
import data  # noqa: E402
import engine  # noqa: E402
import jobs  # noqa: E402
import losses  # noqa: E402
import models  # noqa: E402
from data import Batches, Split  # noqa: E402
from outputs import Outputs  # noqa: E402
from recipes import RECIPES, Recipe  # noqa: E402
from teacher import Teacher  # noqa: E402
from util import graphs, runtime  # noqa: E402
from util.bounds import COUNT  # noqa: E402
from util.runtime import Runtime  # noqa: E402

# What is measured: the job, and how many of --images a repeat takes on a CPU, so that all take about as long.
TASKS = {
    "teacher training": ("teacher", 0.5),
    "student training": ("student", 1),
    "logit distillation": ("distillation", 1),
    "feature distillation": ("distillation_LDH6", 1),
    "testing": ("student", 2),
    "testing, --precision bf16": ("student", 2),
}
BATCH = 256
EPOCHS = 1000  # more than are ever timed


def main() -> None:
    args = parse()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_textbook, (args,)) as elsewhere,
    ):
        ours = Ours(args, Path(folder))
        images = args.images or (len(ours.dataset.train.labels) if ours.device.type == "cuda" else 512)
        measured = {
            "dataset": f"{ours.dataset.name}, {ours.dataset.image_size}x{ours.dataset.image_size}, "
            f"{ours.dataset.num_classes} classes",
            "device": ours.runtime.describe(),
            "precision": ours.runtime.precision,
            "torch": torch.__version__,
            "command": " ".join(["benchmarks/speed.py", *sys.argv[1:]]),
            "repeats": args.repeats,
            "peaks": peaks(ours.runtime),
            "tasks": {
                name: compare(ours, elsewhere, name, int(images * share), args.repeats)
                for name, (_, share) in TASKS.items()
                if "bf16" not in name or ours.runtime.precision == "bf16"
            },
            "cache": ours.cache_pass(images),
            "by_images": {str(k): ours.distil(k * images, 1) for k in (1, 2, 4)},
            "by_students": {str(k): ours.distil(images, k) for k in (1, 2, 4)},
        }
    (HERE / "speed.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_results()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Time this project beside a textbook loop.")
    parser.add_argument("--images", type=cli.number(COUNT), help="in a repeat; default: 512 on a CPU, all on CUDA")
    parser.add_argument("--repeats", type=cli.number(COUNT), default=3, help="of which the median is taken; default: 3")
    cli.add_speed_flags(parser)
    cli.add_data_flags(parser)
    return parser.parse_args()


def compare(ours: "Ours", elsewhere: Executor, name: str, n: int, repeats: int) -> dict:
    """Seconds of both, in turn, after one run of each that shows its memory and does not count.

    elsewhere: a process of the textbook loop's own, as the scripts set how memory is allocated and a textbook's does
    not. Each waits while the other runs, and holds no memory that the other would have had alone.
    """
    runs: dict[str, list[float]] = {"ours": [], "textbook": []}
    memory = {"ours": ours.first(name, n), "textbook": elsewhere.submit(first_textbook, name, n).result()}
    for _ in range(repeats):
        runs["ours"].append(ours.again(name))
        runs["textbook"].append(elsewhere.submit(textbook_again, name).result())
    print(f"{name}, seconds: {runs}", file=sys.stderr)
    rate = {label: n / statistics.median(seconds) for label, seconds in runs.items()}
    network, precision = RECIPES[TASKS[name][0]].network, ours.precision(name)
    operations, moved = work(network, ours.dataset, not name.startswith("testing"), precision)
    return {
        "images": n,
        "seconds": runs,
        "rate": rate,
        "ratio": rate["ours"] / rate["textbook"],
        "memory": memory,
        "flop_per_image": operations,
        "bytes_per_image": moved,
        "precision": precision,
    }


class Side:
    """One of the two that are compared, on the same images, networks and recipes."""

    def __init__(self, args: argparse.Namespace, chosen: Runtime):
        self.runtime, self.device, self.compile = chosen, chosen.device, args.compile == "on"
        self.graphs = args.cuda_graphs == "on" and graphs.possible(chosen)
        self.dataset = data.load(args.dataset, args.data_dir, args.image_size)
        torch.manual_seed(0)
        self.teacher_network = self.build("teacher")
        self.ready: dict[str, Callable[[], None]] = {}

    def build(self, network: str) -> models.CifarResNet:
        return models.build(network, self.dataset.num_classes).to(self.device)

    def part(self, n: int) -> Split:
        """The first n training images, over and over where there are fewer."""
        index = torch.arange(n) % len(self.dataset.train.labels)
        return Split(self.dataset.train.images[index], self.dataset.train.labels[index])

    def task(self, name: str, n: int) -> Callable[[], None]:
        """What runs a task once on n images."""
        recipe = RECIPES[TASKS[name][0]]
        return self.test(recipe, n, name) if name.startswith("testing") else self.training(recipe, n)

    def first(self, name: str, n: int) -> int:
        """Run a task for the first time; give the highest memory, in bytes."""
        self.ready[name] = self.task(name, n)
        memory = self.measured(self.ready[name])[1]
        release(self.device)
        return memory

    def again(self, name: str) -> float:
        """Seconds of the task once more, as in the course of a long run: after two that do not count.

        After one, a step still finds 1 to 2 % of its memory's pages new; in a long run it finds none.
        """
        for _ in range(2):
            self.ready[name]()
        seconds = self.seconds(self.ready[name])
        release(self.device)
        return seconds

    def seconds(self, run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        runtime.synchronize(self.device)
        return time.perf_counter() - started

    def measured(self, run: Callable[[], None]) -> tuple[float, int]:
        """Seconds of the run, from an empty memory, and the highest memory during it, in bytes."""
        reset_peak(self.device)
        return self.seconds(run), peak_memory(self.device)


class Ours(Side):
    """This project, as its scripts run."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        """folder: of the teacher's cache."""
        super().__init__(args, runtime.choose(args.device, args.precision))
        self.folder = folder

    def precision(self, name: str) -> str:
        return "fp32" if name == "testing" else self.runtime.precision

    def batches(self, n: int, **options) -> Batches:
        return Batches(self.part(n), self.dataset.mean, self.dataset.std, BATCH, self.device, **options)

    def teacher(self) -> Teacher:
        return Teacher(self.teacher_network, self.runtime, "benchmark", 0.0, cache_dir=self.folder)

    def training(self, recipe: Recipe, n: int) -> Callable[[], None]:
        """One epoch as jobs.train runs it; the teacher's outputs are there already."""
        network = self.build(recipe.network).to(memory_format=torch.channels_last)
        batches = self.batches(n, shuffle=True)
        teacher = self.teacher() if recipe.distils else None
        forward = jobs.forward_of(network, batches, self.runtime) if self.compile else network
        return functools.partial(next, self.epochs(recipe, network, batches, teacher, forward))

    def epochs(
        self,
        recipe: Recipe,
        network: models.CifarResNet,
        batches: Batches,
        teacher: Teacher | None,
        forward: Callable[[torch.Tensor], Outputs],
    ) -> Iterator[engine.Figures]:
        """Train, at each `next` for an epoch; alpha counts nothing, but that a schedule could weigh a term by 0."""
        source, objective = jobs.aim(recipe, network, teacher, batches)
        yield from engine.fit(
            network,
            batches,
            objective,
            alpha=torch.full((EPOCHS, len(batches)), 0.7),
            learning_rate=lambda epoch, iteration: 1e-3,
            runtime=self.runtime,
            teacher=source,
            forward=forward,
            graphs=self.graphs,
        )

    def test(self, recipe: Recipe, n: int, name: str) -> Callable[[], None]:
        network, batches = self.build(recipe.network), jobs.in_order(self.part(n), self.dataset, self.runtime)
        chosen = replace(self.runtime, precision=self.precision(name))
        return lambda: engine.evaluate(network, batches, chosen)

    def cache_pass(self, n: int) -> dict:
        """Seconds to make the teacher's cache, with maps, beside those of one pass of the teacher over the images."""
        batches = jobs.in_order(self.part(n), self.dataset, self.runtime)
        teacher = self.teacher()

        def live() -> None:
            for batch in batches.epoch(0):
                teacher(batch)

        live()
        seconds, making = [], []
        for _ in range(3):
            seconds.append(self.seconds(live))
            self.forget()
            making.append(self.seconds(lambda: self.teacher().source(batches, frozenset({"logits", "last_map"}))))
        return {"images": n, "pass": statistics.median(seconds), "making": statistics.median(making)}

    def distil(self, n: int, students: int) -> dict:
        """Seconds and memory of distilling students one after another, one epoch each, the teacher's cache included."""
        self.forget()
        recipe = RECIPES["distillation_LDH6"]

        def run() -> None:
            teacher = self.teacher()
            for _ in range(students):
                network = self.build(recipe.network).to(memory_format=torch.channels_last)
                batches = self.batches(n, shuffle=True)
                next(self.epochs(recipe, network, batches, teacher, network))

        seconds, memory = self.measured(run)
        return {"images": n, "students": students, "seconds": seconds, "memory": memory}

    def forget(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


class PerImage(Dataset):
    """Images as torchvision's CIFAR100 gives them: from an array to PIL to a transformed tensor, one by one."""

    def __init__(self, split: Split, mean: data.Statistics, std: data.Statistics):
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Textbook(Side):
    """As tutorials do: a DataLoader, fp32, the teacher at every step, .item() at every step."""

    def __init__(self, args: argparse.Namespace):
        name = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        super().__init__(args, Runtime(torch.device(name), "fp32"))
        self.teacher_network.eval().requires_grad_(False)

    def again(self, name: str) -> float:
        """Seconds of the task once more; it keeps no memory from one step to the next, so nothing comes before."""
        return self.seconds(self.ready[name])

    def loader(self, n: int, shuffle: bool) -> DataLoader:
        images = PerImage(self.part(n), self.dataset.mean, self.dataset.std)
        return DataLoader(images, BATCH, shuffle=shuffle, num_workers=2, pin_memory=self.device.type == "cuda")

    def training(self, recipe: Recipe, n: int) -> Callable[[], None]:
        network, loader, objective = self.build(recipe.network), self.loader(n, True), losses.Objective(recipe)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)

        def epoch() -> None:
            network.train()
            total = 0.0
            for images, labels in loader:
                images, labels = images.to(self.device), labels.to(self.device)
                targets = None
                if recipe.distils:
                    with torch.no_grad():
                        targets = self.teacher_network(images)
                loss = objective(network(images), targets, labels, 0.7)["loss"]
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item()

        return epoch

    def test(self, recipe: Recipe, n: int, name: str) -> Callable[[], None]:
        network, loader = self.build(recipe.network).eval(), self.loader(n, False)

        def test() -> None:
            total, top1, top5 = 0.0, 0, 0
            with torch.no_grad():
                for images, labels in loader:
                    images, labels = images.to(self.device), labels.to(self.device)
                    logits = network(images).logits
                    total += F.cross_entropy(logits, labels).item()
                    best = logits.topk(min(5, logits.shape[1])).indices
                    top1 += (best[:, 0] == labels).sum().item()
                    top5 += (best == labels[:, None]).sum().item()

        return test


_textbook: Textbook  # of the textbook loop's own process


def begin_textbook(args: argparse.Namespace) -> None:
    global _textbook
    multiprocessing.set_start_method(None, force=True)  # the loader's workers start as they do in any script
    _textbook = Textbook(args)


def first_textbook(name: str, n: int) -> int:
    return _textbook.first(name, n)


def textbook_again(name: str) -> float:
    return _textbook.again(name)


def work(network: str, dataset: data.Dataset, training: bool, precision: str) -> tuple[float, float]:
    """Floating-point operations and the fewest bytes moved for one image, by what the convolutions must do.

    Operations: those on pixels, not on the zeros around them; a backward pass is twice a forward pass, but for the
    first convolution, whose input needs no gradient. Bytes: each convolution reads its input and writes its output once
    (all else fused into it); its backward pass does so twice, once for each gradient. Weights count nothing, as a batch
    shares them.
    """
    side = dataset.image_size
    model = models.build(network, dataset.num_classes).eval()
    operations, moved = 0.0, 0

    def count(conv: torch.nn.Conv2d, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal operations, moved
        _, channels, height, width = inputs[0].shape
        ones, kernel = torch.ones(1, 1, height, width), torch.ones(1, 1, *conv.kernel_size)
        taps = F.conv2d(ones, kernel, None, conv.stride, conv.padding)
        passes = 1 if not training else 2 if channels == 3 else 3
        operations += passes * 2 * taps.sum().item() * channels * conv.out_channels
        moved += inputs[0].numel() + output.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return operations, (3 if training else 1) * (2 if precision == "bf16" else 4) * moved


def peaks(chosen: Runtime) -> dict[str, float]:
    """What the device reaches: operations a second of a large matrix product, bytes a second of a large copy.

    In bf16 only where the runtime is: a processor without it would take minutes for one product.
    """
    device, n = chosen.device, 8192 if chosen.device.type == "cuda" else 3072
    found = {}
    kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if chosen.precision == "bf16" else {})
    for name, kind in kinds.items():
        a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
        found[name] = 2 * n**3 / fastest(lambda a=a, b=b: a @ b, device)
    source = torch.randn((1 << 30 if device.type == "cuda" else 1 << 27), device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.nbytes / fastest(lambda: target.copy_(source), device)
    return found


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """The least of several times, in seconds."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        run()
        runtime.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def release(device: torch.device) -> None:
    """Give what was freed back, so that it is neither the next task's nor kept from another process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now


def peak_memory(device: torch.device) -> int:
    """The highest use since `reset_peak`: allocated on CUDA, resident in this process on a CPU; in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_results() -> None:
    """RESULTS.md from the JSONs of speed, loss_cost, accuracy and calibration, whichever are there, and speed.png."""
    parts = ["# Benchmarks"]
    speed, loss_file, accuracy = HERE / "speed.json", HERE / "loss_cost.json", HERE / "accuracy.json"
    if speed.exists():
        measured = json.loads(speed.read_text())
        parts += speed_section(measured)
        plot(measured)
    if loss_file.exists():
        parts += losses_section(json.loads(loss_file.read_text()))
    if accuracy.exists():
        parts += accuracy_section(json.loads(accuracy.read_text()))
    if (calibration := HERE / "calibration.json").exists():
        parts += calibration_section(json.loads(calibration.read_text()))
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


def losses_section(measured: dict) -> list[str]:
    """What a step costs with each loss, as Markdown."""
    rows = ["| loss | ms a step | ratio to kd | of the repeats |", "|---|---:|---:|---:|"]
    for name, ratio in sorted(measured["ratio"].items(), key=lambda item: item[1]):
        title = f"{name}, learns parts of its own" if name in measured["learns"] else name
        low, high = measured["spread"][name]
        rows.append(f"| {title} | {measured['milliseconds'][name]:.1f} | {ratio:.2f} | {low:.2f} to {high:.2f} |")
    return [
        "## What a loss costs",
        f"    python {measured['command']}",
        f"{measured['pair']}; {measured['device']}; whole steps (forward, loss, backward, Adam), the teacher's outputs "
        f"remembered; medians of {measured['repeats']} alternating repeats. none: cross-entropy alone.",
        "\n".join(rows),
    ]


def speed_section(measured: dict) -> list[str]:
    """The figures of speed, as Markdown."""
    peak = measured["peaks"]
    rows = ["| task | images/s | textbook, images/s | ratio | of the roofline | memory, GB | textbook, GB |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, task in measured["tasks"].items():
        floor = max(task["flop_per_image"] / peak[task["precision"]], task["bytes_per_image"] / peak["bytes"])
        memory = [f"{task['memory'][label] / 1e9:.2f}" for label in ("ours", "textbook")]
        rates = [f"{task['rate'][label]:,.0f}" for label in ("ours", "textbook")]
        share = f"{100 * floor * task['rate']['ours']:.0f} %"
        rows.append(f"| {name} | {' | '.join(rates)} | {task['ratio']:.1f}x | {share} | {' | '.join(memory)} |")
    cache = measured["cache"]
    reached = [f"{peak[name] / 1e9:,.0f} GFLOP/s in {name}" for name in ("bf16", "fp32") if name in peak]
    grown = ["| images | students | seconds | memory, GB |", "|---:|---:|---:|---:|"]
    for run in [*measured["by_images"].values(), *list(measured["by_students"].values())[1:]]:
        grown.append(f"| {run['images']:,} | {run['students']} | {run['seconds']:.1f} | {run['memory'] / 1e9:.2f} |")
    return [
        "## Speed",
        f"    python {measured['command']}",
        f"{measured['dataset']}; {measured['device']}; {measured['precision']}; torch {measured['torch']}; batches of "
        f"{BATCH}; medians of {measured['repeats']} alternating repeats, ours each after two that do not count. The "
        "textbook loop, in a process that waits meanwhile: a torchvision data set, ToTensor and Normalize per image, a "
        "DataLoader with two workers, fp32, the teacher at every step, `.item()` at every step. Distilling is with the "
        "teacher's cache being there. The scripts test in fp32 unless told otherwise. Memory: the highest resident, or "
        "on CUDA allocated, during a first run.",
        "\n".join(rows),
        f"Measured on the spot: {' and '.join(reached)} (a matrix product), {peak['bytes'] / 1e9:,.0f} GB/s (a copy). "
        "The roofline counts what the convolutions must do, on pixels and not on the zeros around them, with all else "
        "fused into them; for distilling, the student's part.",
        f"The teacher's cache, logits and maps of {cache['images']:,} images: {cache['making']:.1f} s, beside "
        f"{cache['pass']:.1f} s of one pass of the teacher ({cache['making'] / cache['pass']:.2f}x).",
        "Distilling (distillation_LDH6), one epoch a student, the teacher's cache made anew each time and included:",
        "\n".join(grown),
        "![speed](speed.png)",
    ]


def accuracy_section(measured: dict) -> list[str]:
    """The figures of accuracy, as Markdown."""
    rows = ["| job | fast, top-1 | plain, top-1 | difference of the means |", "|---|---:|---:|---:|"]
    for job, runs in measured["top1"].items():
        mean = {mode: statistics.mean(runs[mode]) for mode in ("fast", "plain")}
        cells = [" ".join(f"{top1:.2f}" for top1 in runs[mode]) for mode in ("fast", "plain")]
        cells.append(f"{mean['fast'] - mean['plain']:+.2f}")
        rows.append(f"| {job} | {' | '.join(cells)} |")
    seeds = min(len(runs[mode]) for runs in measured["top1"].values() for mode in runs)
    unseen = 2 * measured["standard_error"] * math.sqrt(2 / seeds)
    return [
        "## Accuracy, fast and plain",
        f"    python {measured['command']}",
        f"{measured['dataset']}; {measured['device']}; one teacher for all, top-1 of each seed. Fast: as the scripts "
        "run by themselves. Plain: `--precision fp32 --teacher_cache off`. The standard error of one top-1 is "
        f"{measured['standard_error']:.2f} points, so differences of "
        f"less than about {unseen:.1f} points can't be seen.",
        "\n".join(rows),
    ]


def calibration_section(measured: dict) -> list[str]:
    """What simulated tables say, as Markdown."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    null = ["| table | seeds a row | a false verdict anywhere | differences' intervals hold the truth | rows' own |"]
    null.append("|---|---|---:|---:|---:|")
    power = ["| table | seeds a row | finds a row 1 point better |", "|---|---|---:|"]
    within = [
        "| KMJ rows above plain KD, points | test images | seeds a row | says within noise |",
        "|---:|---:|---:|---:|",
    ]
    for kind in measured["kinds"]:
        table = kind["table"] + ", --claims" * kind["claims"]
        seeds = " or ".join(map(str, kind["seeds"]))
        if len(kind["gains"]) > 1:
            gain = next(iter(kind["gains"].values()))
            within.append(f"| {gain:g} | {kind['images']:,} | {seeds} | {share(kind['within'])} |")
        elif kind["gains"]:
            power.append(f"| {table} | {seeds} | {share(kind['found'])} |")
        else:
            shares = " | ".join(share(kind[name]) for name in ("wrong", "covering", "own_covering"))
            null.append(f"| {table} | {seeds} | {shares} |")
    return [
        "## Verdicts of simulated tables",
        f"    python {measured['command']}",
        f"{measured['tables']:,} tables of each kind, made by the report from simulated runs, whose spread is that of "
        "the studies (0.41 points a run on 10,000 test images, two runs of a row disagreeing on 15 % of them, and 0.2 "
        "points common to a seed's runs). Without any difference between rows; 3 or 1: every third row, the student "
        "and kd have 3 seeds, the others 1. From one seed nothing is judged, and its intervals, which are over test "
        "images, are not counted. Rows' own: the bars of top1.png over seeds. The Monte Carlo error of 5 % is 0.7 %.",
        "\n".join(null),
        "One row is 1 point better; whether it is found beyond noise against the student:",
        "\n".join(power),
        "The claim that schedules are within noise, which is less than 0.5 points; it is true in the last line alone:",
        "\n".join(within),
    ]


def plot(measured: dict) -> None:
    """speed.png: images/s of both, and how seconds grow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names, at = list(measured["tasks"]), range(len(measured["tasks"]))
    for shift, label, colour in ((0.2, "textbook", "#969696"), (-0.2, "ours", "#2171b5")):
        rates = [measured["tasks"][name]["rate"][label] for name in names]
        bars = left.barh([y + shift for y in at], rates, 0.4, label=label, color=colour)
        left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.set_yticks(list(at), names)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_xlabel("images/s")
    left.legend()
    for key, label, colour in (("images", "images", "#2171b5"), ("students", "students", "#b2182b")):
        runs = list(measured[f"by_{key}"].values())
        times = [run[key] / runs[0][key] for run in runs]
        right.plot(times, [run["seconds"] for run in runs], "o-", label=f"times as many {label}", color=colour)
    right.set_xlabel("times as many")
    right.set_ylabel("seconds, the teacher's cache included")
    right.set_ylim(bottom=0)
    right.legend()
    figure.savefig(HERE / "speed.png", dpi=100)


if __name__ == "__main__":
    cli.run(main)
