"""Write a trained network as a file that other programs run: RGB images as they are in, logits out.

    python export.py --model_job student --format onnx           # <checkpoint_dir>/resnet18.onnx
    python export.py --model_job student --format onnx --int8    # a quarter of its size
    python export.py --model_job student --format torch          # a program of torch.export, .pt2
    python export.py --model_job student --format safetensors    # the bare weights

Before it is written, a file is opened as its users would open it, and compared with the checkpoint on the test images.
"""

import tempfile
from pathlib import Path

import torch

import cli
import data
import deployed
import jobs
from recipes import RECIPES
from util import files, runtime
from util.runtime import UserError, say

COMPARED = 256  # test images on which the logits are compared
TOLERANCE = 1e-4  # of the logits, as a share of the largest where that is above 1


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
    with files.replacing(out, new=not args.overwrite) as file:
        file.write(content)
    say(f"{out}: written; it takes uint8 RGB images (N, H, W, 3)" if suffix != ".safetensors" else f"{out}: written")


def _logits(content: bytes, suffix: str, split: data.Split) -> torch.Tensor:
    """What the file of that content gives for all images of the split."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{suffix}")
        path.write_bytes(content)
        return deployed.logits_of(deployed.opened(path, "cpu", trust=True).classify, split)


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
