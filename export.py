"""Write a trained network as a file that other programs run: RGB images as they are in, logits out.

    python export.py --model_job student --format onnx           # <checkpoint_dir>/resnet18.onnx
    python export.py --model_job student --format onnx --int8    # a quarter of its size
    python export.py --model_job student --format torch          # a program of torch.export, .pt2
    python export.py --model_job student --format safetensors    # the bare weights

Before it is written, a file is opened as its users would open it, and compared with the checkpoint on the test images
and with predict.py on whole photos.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cli
import data
import jobs
from images.folders import scaled
from recipes import RECIPES
from tools import deployed
from util import files, runtime
from util.runtime import UserError, say

COMPARED = 256  # test images on which the logits are compared
TOLERANCE = 1e-4  # of the logits, as a share of the largest where that is above 1
# Heights and widths, as multiples of the network's image size, of the photos that a file is tried on: portraits and
# landscapes, which Pillow scales in different orders, a strip, and smaller ones.
PHOTOS = [(1.33, 1), (2.7, 2), (3, 1.5), (2, 2.7), (1.1, 3.1), (9, 0.7), (0.6, 0.45), (0.3, 0.9)]
GREY = 1  # levels that a scaled value may differ by: none seen; passes in the wrong order cost 4 and more
POINTS = 1.0  # that a probability may differ by: 0.00 seen


def main() -> None:
    parser = cli.Parser(description="Write a trained network as a file that other programs run.")
    cli.add_trained_flags(parser, tuple(RECIPES))
    parser.add_argument("--format", choices=deployed.SUFFIXES, required=True, help="torch: a program of torch.export")
    parser.add_argument("--int8", action="store_true", help="with onnx: quantise it, by training images' activations")
    parser.add_argument("--out", type=cli.path, help="the file; default: beside the checkpoint, with its name")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    cli.add_data_flags(parser)
    args = parser.parse_args()

    suffix = deployed.SUFFIXES[args.format]
    if args.int8 and args.format != "onnx":
        raise UserError(f"--int8 is for --format onnx, not for {args.format}; leave one of the two away")
    if args.precision == "bf16":
        raise UserError("--precision bf16: an export is in fp32, or with --int8; leave the flag away")
    deployed.require(f"--format {args.format}", deployed.NEEDS[args.format])
    chosen = runtime.choose(args.device, "fp32")
    recipe, path, trained = cli.trained(args, tuple(RECIPES))
    trained = cli.with_statistics(args, recipe, trained)
    out = args.out or path.with_name(f"{path.stem}{'_int8' * args.int8}{suffix}")
    if out.suffix != suffix:
        raise UserError(f"--out {out}: a file of --format {args.format} is called ...{suffix}")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there; give another --out, or replace it with --overwrite")
    files.ensure_writable(out.parent, "--out")
    dataset = cli.load_data(args, chosen, trained.about)
    jobs.check_fit(trained, dataset, path)
    trained = jobs.settled(trained, dataset, chosen, path)
    if args.int8 and dataset.train is None:
        raise UserError("--int8 needs training images to measure on; give a --data_dir that has them, too")

    jobs.test(trained, dataset, chosen)
    about = deployed.told_of(recipe, trained, dataset)
    content = deployed.content(args.format, trained.network, about)
    expected = deployed.logits_of(deployed.Deployed(trained.network, about), dataset.test, COMPARED)
    logits = _logits(content, suffix, dataset.test)
    difference = _compared(logits[:COMPARED], expected, args.format)
    print(
        f"{args.format}: {_figures(content, logits, dataset.test)}, logits within {difference:.1e} of the checkpoint's"
    )
    if args.int8:
        content = deployed.quantised(content, dataset.train, about)
        print(f"int8: {_figures(content, _logits(content, suffix, dataset.test), dataset.test)}")
    if suffix != ".safetensors":  # which has no scaling
        print(_tried_on_photos(content, suffix, about))
    with files.replacing(out, new=not args.overwrite) as file:
        file.write(content)
    say(f"{out}: written; it takes uint8 RGB images (N, H, W, 3)" if suffix != ".safetensors" else f"{out}: written")


def _logits(content: bytes, suffix: str, split: data.Split) -> torch.Tensor:
    """What the file of that content gives for all images of the split."""
    with _opened(content, suffix) as classify:
        return deployed.logits_of(classify, split)


@contextmanager
def _opened(content: bytes, suffix: str) -> Iterator[deployed.Classify]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{suffix}")
        path.write_bytes(content)
        yield deployed.opened(path, "cpu", trust=True).classify


def _tried_on_photos(content: bytes, suffix: str, about: deployed.About) -> str:
    """Compare whole photos given to the file with the same photos as predict.py scales them, and say the result.

    Raises UserError where they differ by more than rounding.
    """
    size, random, grey, points = about["image_size"], np.random.default_rng(0), 0.0, 0.0
    prepare = deployed.Preparation(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with _opened(content, suffix) as classify:
        for height, width in PHOTOS:
            photo = _photo(max(1, round(height * size)), max(1, round(width * size)), random)
            whole, square = (torch.from_numpy(np.array(image))[None] for image in (photo, scaled(photo, size)))
            difference = 255 * prepare(whole) - square.permute(0, 3, 1, 2)
            grey = max(grey, difference.abs().max().item())
            probabilities = classify(whole).softmax(1) - classify(square).softmax(1)
            points = max(points, 100 * probabilities.abs().max().item())
    told = f"within {grey:.0f} grey levels and {points:.2f} points of probability of predict.py's"
    if not (grey < GREY + 0.5 and points <= POINTS):
        raise UserError(f"whole photos are not {told}: nothing was written")
    return f"whole photos: {told}"


def _photo(height: int, width: int, random: np.random.Generator) -> Image.Image:
    """Smooth areas with fine noise, in RGB."""
    small = Image.fromarray(random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(small.resize((width, height))) + noise).clip(0, 255).astype(np.uint8))


def _compared(logits: torch.Tensor, expected: torch.Tensor, form: str) -> float:
    """The largest difference. Raises UserError where it is more than rounding."""
    difference = (logits - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):  # NaN, too
        raise UserError(f"as {form} its logits differ from the checkpoint's by {difference:.1e}: nothing was written")
    return difference


def _figures(content: bytes, logits: torch.Tensor, split: data.Split) -> str:
    top1 = 100 * (logits.argmax(1) == split.labels).double().mean().item()
    return f"Top-1 test Accuracy: {top1:.8f}%, {len(content) / 1e6:.2f} MB"


if __name__ == "__main__":
    cli.run(main)
