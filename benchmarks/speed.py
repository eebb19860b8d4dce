"""How fast this project is, beside a textbook loop on the same images in the same process.

    python benchmarks/speed.py --dataset folder --data_dir my_images

Measures images/s of training the teacher and the student, of distilling (logits; feature maps) and of testing, in
alternating repeats; the share of the roofline; peak memory; and how seconds and memory grow with the number of images
and of students. Writes speed.json, RESULTS.md and speed.png beside itself.
"""

import ctypes
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cli  # noqa: E402
import data  # noqa: E402
import engine  # noqa: E402
import jobs  # noqa: E402
import losses  # noqa: E402
import models  # noqa: E402
import runtime  # noqa: E402
from data import Batches, Split  # noqa: E402
from recipes import RECIPES, Recipe  # noqa: E402
from runtime import Runtime  # noqa: E402
from teacher import Teacher  # noqa: E402

# What is measured: the job, and how many of --images a repeat takes on a CPU, so that all take about as long.
TASKS = {
    "teacher training": ("teacher", 0.5),
    "student training": ("student", 1),
    "logit distillation": ("distillation", 1),
    "feature distillation": ("distillation_LDH6", 1),
    "testing": ("student", 2),
}
BATCH = 256


def main() -> None:
    args = parse()
    hardware = runtime.choose(args.device, args.precision)
    dataset = data.load(args.dataset, args.data_dir, args.image_size)
    images = args.images or (len(dataset.train.labels) if hardware.device.type == "cuda" else 512)
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        bench = Bench(dataset, hardware, Path(folder), args.compile)
        measured = {
            "dataset": f"{dataset.name}, {dataset.image_size}x{dataset.image_size}, {dataset.num_classes} classes",
            "device": hardware.describe(),
            "precision": hardware.precision,
            "torch": torch.__version__,
            "command": " ".join(["benchmarks/speed.py", *sys.argv[1:]]),
            "repeats": args.repeats,
            "peaks": peaks(hardware),
            "tasks": {name: bench.compare(name, job, int(images * share), args.repeats)
                      for name, (job, share) in TASKS.items()},
            "cache": bench.cache_pass(images),
            "by_images": {str(k): bench.distil(k * images, 1) for k in (1, 2, 4)},
            "by_students": {str(k): bench.distil(images, k) for k in (1, 2, 4)},
        }  # fmt: skip
    (HERE / "speed.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_results()


def parse():
    """The command line."""
    parser = cli.Parser(description="Time this project beside a textbook loop.")
    parser.add_argument("--images", type=cli.count, help="in a repeat; default: 512 on a CPU, all on CUDA")
    parser.add_argument("--repeats", type=cli.count, default=3, help="of which the median is taken; default: 3")
    cli.add_compile_flag(parser)
    cli.add_data_flags(parser)
    return parser.parse_args()


class PerImage(Dataset):
    """Images as torchvision's CIFAR100 gives them: from an array to PIL to a transformed tensor, one by one."""

    def __init__(self, split: Split, mean: data.Statistics, std: data.Statistics):
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Bench:
    """The same images, networks and recipes for this project and for the textbook loop."""

    def __init__(self, dataset: data.Dataset, hardware: Runtime, folder: Path, compile_mode: str):
        self.dataset, self.hardware, self.folder, self.compile_mode = dataset, hardware, folder, compile_mode
        self.device = hardware.device
        torch.manual_seed(0)
        self.teacher_network = models.build("teacher", dataset.num_classes).to(self.device)

    def part(self, n: int) -> Split:
        """The first n training images, over and over where there are fewer."""
        index = torch.arange(n) % len(self.dataset.train.labels)
        return Split(self.dataset.train.images[index], self.dataset.train.labels[index])

    def batches(self, n: int, **options) -> Batches:
        return Batches(self.part(n), self.dataset.mean, self.dataset.std, BATCH, self.device, **options)

    def teacher(self) -> Teacher:
        return Teacher(self.teacher_network, self.hardware, "benchmark", 0.0, self.folder)

    def compare(self, name: str, job: str, n: int, repeats: int) -> dict:
        """Seconds of both, in turn, after one run of each that does not count."""
        recipe = RECIPES[job]
        ours = self.our_test(recipe, n) if name == "testing" else self.our_training(recipe, n)
        theirs = self.textbook_test(recipe, n) if name == "testing" else self.textbook_training(recipe, n)
        runs: dict[str, list[float]] = {"ours": [], "textbook": []}
        memory = {}
        for repeat in range(repeats + 1):
            for label, run in (("ours", ours), ("textbook", theirs)):
                seconds, peak = self.timed(run)
                if repeat:
                    runs[label].append(seconds)
                    memory[label] = max(peak, memory.get(label, 0))
            print(f"{name}, repeat {repeat}: {seconds:.1f} s the textbook's", file=sys.stderr)
        rate = {label: n / statistics.median(seconds) for label, seconds in runs.items()}
        operations, moved = work(recipe.network, self.dataset, name != "testing")
        return {
            "images": n,
            "seconds": runs,
            "rate": rate,
            "ratio": rate["ours"] / rate["textbook"],
            "memory": memory,
            "flop_per_image": operations,
            "bytes_per_image": moved,
            "precision": "fp32" if name == "testing" else self.hardware.precision,
        }

    def timed(self, run: Callable[[], None]) -> tuple[float, int]:
        """Seconds of the run and the highest memory during it, in bytes."""
        reset_peak(self.device)
        started = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, peak_memory(self.device)

    def our_training(self, recipe: Recipe, n: int) -> Callable[[], None]:
        """One epoch as jobs.train runs it; the teacher's outputs are there already."""
        network = models.build(recipe.network, self.dataset.num_classes)
        network = network.to(self.device, memory_format=torch.channels_last)
        batches = self.batches(n, shuffle=True)
        teacher = self.teacher() if recipe.distils else None
        forward = jobs.forward_of(network, batches, self.hardware, self.compile_mode, recipe)
        loss = jobs.batch_loss(recipe, forward, teacher, batches)
        return lambda: list(engine.fit(network, batches, loss, lambda epoch: 1e-3, 1, self.hardware, recipe.job))

    def our_test(self, recipe: Recipe, n: int) -> Callable[[], None]:
        network = models.build(recipe.network, self.dataset.num_classes).to(self.device)
        batches = jobs.in_order(self.part(n), self.dataset, self.hardware)
        return lambda: engine.evaluate(network, batches, jobs.plain(self.hardware))

    def loader(self, n: int, shuffle: bool) -> DataLoader:
        images = PerImage(self.part(n), self.dataset.mean, self.dataset.std)
        return DataLoader(images, BATCH, shuffle=shuffle, num_workers=2, pin_memory=self.device.type == "cuda")

    def textbook_training(self, recipe: Recipe, n: int) -> Callable[[], None]:
        """As tutorials do: a DataLoader, fp32, the teacher at every step, .item() at every step."""
        network = models.build(recipe.network, self.dataset.num_classes).to(self.device)
        teacher = self.teacher_network.eval().requires_grad_(False)
        loader, objective = self.loader(n, True), losses.objective(recipe)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)

        def epoch() -> None:
            network.train()
            total = 0.0
            for images, labels in loader:
                images, labels = images.to(self.device), labels.to(self.device)
                targets = None
                if recipe.distils:
                    with torch.no_grad():
                        targets = teacher(images)
                loss = objective(network(images), targets, labels, 0.7)["loss"]
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item()

        return epoch

    def textbook_test(self, recipe: Recipe, n: int) -> Callable[[], None]:
        network = models.build(recipe.network, self.dataset.num_classes).to(self.device).eval()
        loader = self.loader(n, False)

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

    def cache_pass(self, n: int) -> dict:
        """Seconds to make the teacher's cache, with maps, beside those of one pass of the teacher over the images."""
        batches = jobs.in_order(self.part(n), self.dataset, self.hardware)
        teacher = self.teacher()

        def live() -> None:
            for batch in batches.epoch(0):
                teacher(batch)

        live()
        seconds = self.timed(live)[0]
        self.forget()
        making = self.timed(lambda: self.teacher().source(batches, True))[0]
        return {"images": n, "pass": seconds, "making": making}

    def distil(self, n: int, students: int) -> dict:
        """Seconds and memory of distilling students one after another, one epoch each, the teacher's cache included."""
        self.forget()
        recipe = RECIPES["distillation_LDH6"]

        def run() -> None:
            teacher = self.teacher()
            for _ in range(students):
                network = models.build(recipe.network, self.dataset.num_classes)
                network = network.to(self.device, memory_format=torch.channels_last)
                batches = self.batches(n, shuffle=True)
                loss = jobs.batch_loss(recipe, network, teacher, batches)
                list(engine.fit(network, batches, loss, lambda epoch: 1e-3, 1, self.hardware, recipe.job))

        seconds, memory = self.timed(run)
        return {"images": n, "students": students, "seconds": seconds, "memory": memory}

    def forget(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def work(network: str, dataset: data.Dataset, training: bool) -> tuple[float, float]:
    """Floating-point operations and the fewest bytes moved for one image, by what the convolutions must do.

    Bytes: each convolution reads its input and writes its output once (all else fused into it), in half precision when
    training and in float32 when testing; its backward pass does so twice, once for each gradient. Weights count
    nothing, as a batch shares them.
    """
    side, batch = dataset.image_size, 4
    model, images = models.build(network, dataset.num_classes), torch.randn(4, 3, side, side)
    moved = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved
        moved += inputs[0].numel() + output.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        logits = model.train(training)(images).logits
        if training:
            logits.sum().backward()
    return counter.get_total_flops() / batch, (3 * 2 if training else 4) * moved / batch


def peaks(hardware: Runtime) -> dict[str, float]:
    """What the device reaches: operations a second of a large matrix product, bytes a second of a large copy."""
    device, n = hardware.device, 8192 if hardware.device.type == "cuda" else 3072
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
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
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not this task's
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
    """RESULTS.md from speed.json and accuracy.json, whichever are there, and speed.png."""
    parts = ["# Benchmarks"]
    speed, accuracy = HERE / "speed.json", HERE / "accuracy.json"
    if speed.exists():
        measured = json.loads(speed.read_text())
        parts += speed_section(measured)
        plot(measured)
    if accuracy.exists():
        parts += accuracy_section(json.loads(accuracy.read_text()))
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


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
    grown = ["| images | students | seconds | memory, GB |", "|---:|---:|---:|---:|"]
    for run in [*measured["by_images"].values(), *list(measured["by_students"].values())[1:]]:
        grown.append(f"| {run['images']:,} | {run['students']} | {run['seconds']:.1f} | {run['memory'] / 1e9:.2f} |")
    return [
        "## Speed",
        f"    python {measured['command']}",
        f"{measured['dataset']}; {measured['device']}; {measured['precision']}; torch {measured['torch']}; batches of "
        f"{BATCH}; medians of {measured['repeats']} alternating repeats in one process. The textbook loop: a "
        "torchvision data set, ToTensor and Normalize per image, a DataLoader with two workers, fp32, the teacher at "
        "every step, `.item()` at every step. Distilling is with the teacher's cache being there; testing is in fp32 "
        "on both sides. Memory: the highest resident, or on CUDA allocated, during the task.",
        "\n".join(rows),
        f"Measured on the spot: {peak['bf16'] / 1e9:,.0f} GFLOP/s in bf16, {peak['fp32'] / 1e9:,.0f} in fp32 (a matrix "
        f"product), {peak['bytes'] / 1e9:,.0f} GB/s (a copy). The roofline counts what the convolutions must do, with "
        "all else fused into them; for distilling, the student's part alone.",
        f"The teacher's cache, logits and maps of {cache['images']:,} images: {cache['making']:.1f} s, beside "
        f"{cache['pass']:.1f} s of one pass of the teacher ({cache['making'] / cache['pass']:.2f}x).",
        "Distilling (distillation_LDH6), one epoch a student, the teacher's cache made anew each time and included:",
        "\n".join(grown),
        "![speed](speed.png)",
    ]


def accuracy_section(measured: dict) -> list[str]:
    """The figures of accuracy, as Markdown."""
    rows = ["| job | fast, top-1 | plain, top-1 | difference | seconds, fast | seconds, plain |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for job, runs in measured["jobs"].items():
        mean = {mode: statistics.mean(run["top1"] for run in runs[mode]) for mode in ("fast", "plain")}
        cells = [" ".join(f"{run['top1']:.2f}" for run in runs[mode]) for mode in ("fast", "plain")]
        cells.append(f"{mean['fast'] - mean['plain']:+.2f}")
        cells += [f"{statistics.mean(run['seconds'] for run in runs[mode]):.0f}" for mode in ("fast", "plain")]
        rows.append(f"| {job} | {' | '.join(cells)} |")
    return [
        "## Accuracy is not the price",
        f"    python {measured['command']}",
        f"{measured['dataset']}; {measured['device']}; one teacher for all, top-1 of each seed. Fast: as the scripts "
        "run by themselves. Plain: `--precision fp32 --teacher_cache off`. The standard error of one top-1 is "
        f"{measured['standard_error']:.2f} points.",
        "\n".join(rows),
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
