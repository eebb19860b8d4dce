"""Whether speed costs accuracy: the same rows as the scripts run by themselves, and in plain arithmetic.

    python benchmarks/accuracy.py --teacher checkpoints/resnet50.pth --dataset cifar100

Runs reproduce.py twice, with and without `--precision fp32 --teacher_cache off`, on the jobs student,
distillation and distillation_LDH6, with seeds 0 and 1; flags that it does not know go to reproduce.py. What is finished
is skipped. Writes accuracy.json and RESULTS.md beside itself.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from speed import HERE, cli, write_results

JOBS = ["student", "distillation", "distillation_LDH6"]
SEEDS = [0, 1]
MODES = {"fast": [], "plain": ["--precision", "fp32", "--teacher_cache", "off"]}


def main() -> None:
    parser = cli.Parser(description="Compare the accuracy of fast and of plain runs.")
    parser.add_argument("--teacher", type=cli.path, required=True, help="checkpoint to distil from")
    parser.add_argument(
        "--work_dir", type=cli.path, default=HERE / "accuracy", help="default: accuracy/ beside this file"
    )
    args, flags = parser.parse_known_args()
    for mode, options in MODES.items():
        folder = args.work_dir / mode
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(args.teacher, folder / "resnet50.pth")
        except OSError as error:
            parser.error(f"--teacher {args.teacher} can't be copied into {folder}: {error.strerror or error}")
        command = [sys.executable, str(HERE.parent / "reproduce.py"), "--jobs", *JOBS]
        command += ["--seeds", *map(str, SEEDS), "--checkpoint_dir", folder, "--results_dir", folder]
        if code := exit_code([*command, *options, *flags]):
            sys.exit(code)
    runs = {mode: [read(args.work_dir / mode, job) for job in JOBS] for mode in MODES}
    first = runs["fast"][0][0]
    p, n = statistics.mean(run["test"]["top1"] for run in runs["fast"][0]) / 100, first["test"]["images"]
    size, row = first["data"], first["recipe"]
    measured = {
        "dataset": f"{first['dataset']}, {size['train_images']:,} training and {n:,} test images of "
        f"{size['image_size']}x{size['image_size']} pixels, {size['classes']} classes, {row['epochs']} epochs, "
        f"batches of {row['batch_size']}",
        "device": f"{first['device']}, {first['precision']} and {runs['plain'][0][0]['precision']}",
        "command": " ".join(["benchmarks/accuracy.py", *sys.argv[1:]]),
        "standard_error": 100 * math.sqrt(p * (1 - p) / n),
        "top1": {
            job: {mode: [run["test"]["top1"] for run in runs[mode][number]] for mode in MODES}
            for number, job in enumerate(JOBS)
        },
    }
    (HERE / "accuracy.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_results()


def exit_code(command: list) -> int:
    """Run the command. Ctrl-C reaches it as well: then wait until it has kept its run's state."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            return child.wait()


def read(folder: Path, job: str) -> list[dict]:
    """The results of the job, seed by seed."""
    return [json.loads((folder / f"{job}_seed{seed}.json").read_text()) for seed in SEEDS]


if __name__ == "__main__":
    cli.run(main)
