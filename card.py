"""Write a student's card: the student beside its teacher, in cost and in worth.

    python card.py --model_job student
    python card.py --model_job my_run --teacher my_resnet50.pth

Writes <results_dir>/<name>_card.md, and the same as .json.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import cli
import jobs
import models
from data import Dataset
from recipes import RECIPES, Recipe
from tools import deployed, measures
from util import environment, files, runtime
from util.runtime import Runtime, say
from util.text import in_markdown

# A line of the card's table: what it is, its key in the JSON, how it is written.
LINES = [
    ("network", "network", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("multiply-adds for an image", "multiply_adds", "{:,}"),
    ("checkpoint, MB", "megabytes", "{:.2f}"),
    ("time for one image alone, ms", "latency_ms", "{:.2f}"),
    (f"images/s in batches of {measures.BATCH}", "images_per_second", "{:,.1f}"),
    ("top-1, %", "top1", "{:.2f}"),
    ("top-5, %", "top5", "{:.2f}"),
    ("calibration error (ECE), points", "ece", "{:.2f}"),
]
RATIOS = {"parameters", "multiply_adds", "megabytes", "latency_ms", "images_per_second"}


def main() -> None:
    parser = cli.Parser(description="Write a student's card: the student beside its teacher, in cost and in worth.")
    cli.add_trained_flags(parser, tuple(RECIPES))
    parser.add_argument("--teacher", type=cli.path, help="its checkpoint; default: <checkpoint_dir>/resnet50.pth")
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    args = parser.parse_args()

    chosen = runtime.choose(args.device, "fp32" if args.precision == "auto" else args.precision)
    recipe, path, student = cli.trained(args, tuple(RECIPES), beside_teacher=True)
    teacher_path = args.teacher or cli.teacher_path(args)
    teacher_recipe = cli.teacher_recipe(args, teacher_path)
    teacher = jobs.load(teacher_recipe, teacher_path, args.dataset, args.stem, args.image_size, args.weights_key)
    teacher = cli.with_statistics(args, teacher_recipe, teacher)
    files.ensure_writable(cli.results_dir(args), "--results_dir")
    dataset = cli.load_data(args, chosen, student.about)
    jobs.check_fit(student, dataset, path)
    jobs.check_fit(teacher, dataset, teacher_path)
    student = jobs.settled(student, dataset, chosen, path)
    teacher = jobs.settled(teacher, dataset, chosen, teacher_path)

    sides, logits = {}, {}
    for name, row, trained, file in (
        ("teacher", teacher_recipe, teacher, teacher_path),
        ("student", recipe, student, path),
    ):
        say(f"measuring the {name}: its speed, then all test images")
        sides[name], logits[name] = _side(row, trained, file, dataset, chosen)
    card = {
        "name": recipe.job,
        "seed": args.seed,
        "dataset": dataset.name,
        "test_images": len(dataset.test.labels),
        "test_fingerprint": dataset.test_fingerprint,
        "image_size": dataset.image_size,
        "device": chosen.describe(),
        "precision": chosen.precision,
        "versions": environment.versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **sides,
        "agreement": 100 * (logits["student"].argmax(1) == logits["teacher"].argmax(1)).double().mean().item(),
        "lost_most": [
            {"class": dataset.classes[k], "images": n, "teacher_top1": of_teacher, "student_top1": of_student}
            for k, n, of_teacher, of_student in measures.lost_most(**logits, labels=dataset.test.labels)
        ],
    }
    folder = cli.results_dir(args) / (f"seed{args.seed}" if args.seed else "")
    there = [folder / f"{recipe.job}_card.{suffix}" for suffix in ("md", "json")]
    with files.replacing_all(there) as (page, data):
        page.write(_page(card).encode())
        data.write((json.dumps(card, indent=1) + "\n").encode())
    print(_page(card), end="")
    say(f"{there[0]} and .json: written")


def _side(
    recipe: Recipe, trained: jobs.Trained, path: Path, dataset: Dataset, chosen: Runtime
) -> tuple[dict[str, Any], torch.Tensor]:
    """A network's figures, without what it was distilled through, and its logits of the test images."""
    whole = deployed.without_projector(trained.network)
    network = models.folded(whole).to(chosen.device)
    logits = measures.logits_of(network, jobs.in_order(dataset.test, dataset, chosen, trained.normalisation), chosen)
    jobs.ensure_finite(logits.abs().max().item())
    name = deployed.told_of(recipe, trained, dataset)["network"]
    figures = {
        "network": models.TITLES.get(models.canonical(name), name),
        "parameters": sum(value.numel() for value in whole.parameters()),
        "megabytes": path.stat().st_size / 1e6,
    }
    figures |= measures.cost(network, dataset.image_size, chosen) | measures.worth(logits, dataset.test.labels)
    return figures, logits


def _page(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    teacher, student = card["teacher"], card["student"]
    lines = [
        f"# {in_markdown(card['name'])}, beside its teacher",
        "",
        f"On the {card['test_images']:,} test images of {card['dataset']}, {card['image_size']}x{card['image_size']} "
        f"pixels; {in_markdown(card['device'])}, {card['precision']}. Times are medians of repeats.",
        "",
        "| | teacher | student | student / teacher |",
        "|---|---:|---:|---:|",
    ]
    for title, key, form in LINES:
        ratio = f"{student[key] / teacher[key]:.2f}" if key in RATIOS else ""
        lines.append(f"| {title} | {form.format(teacher[key])} | {form.format(student[key])} | {ratio} |")
    lines += ["", f"Both give the same class to {card['agreement']:.2f} % of the images.", ""]
    if card["lost_most"]:
        lines += ["Where the student loses most (top-1, %):", ""]
        lines += ["| class | images | teacher | student | difference |", "|---|---:|---:|---:|---:|"]
    for row in card["lost_most"]:
        ours, theirs, name = row["student_top1"], row["teacher_top1"], in_markdown(row["class"])
        lines.append(f"| {name} | {row['images']} | {theirs:.2f} | {ours:.2f} | {ours - theirs:+.2f} |")
    if not card["lost_most"]:
        lines += ["There is no class where the student is right less often."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
