"""Print the best five classes of images, or of all images in folders: a line an image, most likely class first.

python predict.py --model_job student photo.jpg photos/
python predict.py --model student.onnx photo.jpg    # what export.py wrote, or any checkpoint of this project
"""

import argparse
import math

import torch

import cli
import jobs
from images.folders import ImageFiles, images_below
from recipes import RECIPES
from tools import deployed
from util import runtime
from util.runtime import UserError, say
from util.text import printable

BATCH = 64


def main() -> None:
    parser = cli.Parser(description="Print the best five classes of images, a line an image.")
    parser.add_argument("paths", type=cli.path, nargs="+", metavar="PATH", help="an image, or a folder of images")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_job", help=f"a name that a run was given, or {', '.join(RECIPES)}; by its checkpoint")
    model.add_argument("--model", type=cli.path, help="a checkpoint, or what export.py wrote")
    parser.add_argument("--trust_pt2", action="store_true", help="open a .pt2 file, which could run code: your own")
    cli.add_seed_flag(parser)
    cli.add_checkpoint_dir_flags(parser)
    cli.add_device_flag(parser)
    args = parser.parse_args()
    refuse_idle(args, parser)

    if args.model:
        opened = deployed.opened(args.model, args.device, args.trust_pt2)
    else:
        where = cli.checkpoint_dir(args)
        recipe = jobs.recipe_named(args.model_job, where, tuple(RECIPES), args.seed)
        path = jobs.checkpoint_path(recipe, where, args.seed)
        trained = jobs.load(recipe, path, args.dataset)
        opened = deployed.from_checkpoint(trained, path, runtime.choose(args.device, "fp32").device)

    files, problems = [], 0
    for path in args.paths:
        found = images_below(path) if path.is_dir() else [path]
        if not found:
            problems += 1
            say(f"{printable(path)} holds no images")
        files += found
    problems += _predict(opened, ImageFiles(files, opened.about["image_size"]))
    if problems:
        raise UserError(f"{problems} of what was given can't be read or classified, see above; the others are done")


def refuse_idle(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise UserError for a flag that says nothing of the model that was given."""
    own, other = ("model", "model_job") if args.model else ("model_job", "model")
    flags = ("seed", "dataset", "checkpoint_dir") if args.model else ("trust_pt2",)
    for flag in flags:
        if getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--{flag} is for --{other}, not for --{own}; leave the flag away")
    if args.trust_pt2 and args.model.suffix != ".pt2":
        raise UserError(f"--trust_pt2 is for a .pt2 file, which {args.model} is not; leave the flag away")


def _predict(opened: deployed.Opened, images: ImageFiles) -> int:
    """Print a line for each image that can be classified, in order, and say why others can't; how many these are."""
    parts, failed, problems = torch.arange(len(images)).split(BATCH), 0, []
    for part, pixels in zip(parts, images.read(parts, problems), strict=True):
        for problem in problems:
            say(str(problem))
        bad = {problem.path for problem in problems}
        failed += len(problems)
        problems.clear()
        good = [k for k, index in enumerate(part.tolist()) if images.paths[index] not in bad]
        if not good:
            continue
        probabilities, classes = opened.classify(pixels[good]).softmax(1).topk(min(5, len(opened.about["classes"])))
        for k, row, numbers in zip(good, probabilities.tolist(), classes.tolist(), strict=True):
            if not math.isfinite(sum(row)):
                failed += 1
                say(f"the network gives no finite figures for {printable(images.paths[part[k]])}")
                continue
            names = [printable(opened.about["classes"][number]) for number in numbers]
            best = [f"{name} {100 * p:.2f}%" for name, p in zip(names, row, strict=True)]
            print("\t".join([printable(images.paths[part[k]]), *best]), flush=True)
    return failed


if __name__ == "__main__":
    cli.run(main)
