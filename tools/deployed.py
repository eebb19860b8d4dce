"""A network as it leaves the project: RGB images as they are (uint8, of any size) in, logits out.

What others run: an ONNX model, a program of torch.export (.pt2), or the bare weights (safetensors). All carry the
names of the classes and what else a checkpoint's about.json tells. The optional packages are asked for by name.
"""

import copy
import importlib
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import checkpoint
import jobs
from data import Dataset, Split
from images.folders import ImageFiles, columns_first
from models import FeatureStudent, folded
from recipes import Recipe
from util.runtime import UserError, choose, inference_batch, is_out_of_memory

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "safetensors": ("safetensors",)}
LOBES = 3  # of Pillow's Lanczos filter, on either side
PREPARE = "prepare."  # begins the names of the nodes in an ONNX file that scale and normalise the images
AXES = ("batch", "height", "width")  # of an export's images, which can have any size
UNIT = 2**11
TINY = 1e-7  # whose sinc is 1
CALIBRATION_IMAGES = 512  # that the ranges of an int8 model's activations are measured on
CALIBRATION_BATCH = 32

About = dict[str, Any]
Classify = Callable[[torch.Tensor], torch.Tensor]  # uint8 (N, H, W, 3) to logits, float32 (N, classes)


class Opened(NamedTuple):
    """A model from a file, and what the file says of it: classes, image_size, and more."""

    classify: Classify
    about: About


def told_of(recipe: Recipe, trained: jobs.Trained, dataset: Dataset) -> About:
    """What an export tells of the network, which `dataset` was loaded for: see checkpoint.save."""
    own = trained.about or {
        "network": recipe.built,
        "stem": trained.stem or checkpoint.stem(trained.network.state_dict()) or "standard",
    }
    mean, std = trained.normalisation or (dataset.mean, dataset.std)
    return {
        "job": recipe.job,
        "network": "student" if own["network"] == "feature_student" else own["network"],  # its projector stays here
        "stem": own["stem"],
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "mean": list(mean),
        "std": list(std),
    }


class Preparation(nn.Module):
    """uint8 (N, H, W, 3) to the network's input, float32 (N, 3, size, size): scaled, cut to a square, normalised.

    The scaling is that of images.folders.scaled, to the last bit: Lanczos over the largest square around the centre,
    one pass along the rows and one along the columns, in the same order, each rounded to whole grey values. As Pillow
    does, it sums products of whole numbers, of pixels and weights in units of 1 / UNIT^2. float32 does not hold these
    sums, so those of the weights' upper and lower halves are apart: each stays below 2^24.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.size = size
        self._pi = torch.tensor(math.pi, dtype=torch.float64)  # a plain number ends up as float32 in an ONNX model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[1:3]
        side = torch.sym_min(height, width)
        weights = *self._weights(width, side), *self._weights(height, side)
        # A graph has both branches, since the order depends on the image's shape.
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = torch.cond(columns_first(height, width, self.size), _columns_first, _rows_first, (pixels, *weights))
        return (pixels / 255 - self.mean) / self.std

    def _weights(self, length: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each pixel of a row is in each of the scaled one's: the upper and lower halves (size, length)."""
        pixels = (2 * torch.arange(length, dtype=torch.float64) + 1 - (length - side)) * self.size
        centres = (2 * torch.arange(self.size, dtype=torch.float64) + 1) * side
        # The filter is wider where the image shrinks, against aliasing.
        x = (pixels - centres[:, None]) / (2 * torch.sym_max(side, self.size))
        x = torch.where(x == 0, TINY, x) * self._pi  # below, 0 / 0 would be NaN
        weights = torch.where(x.abs() < LOBES * self._pi, LOBES * x.sin() * (x / LOBES).sin() / x**2, 0.0)
        weights = (weights / weights.sum(1, keepdim=True) * UNIT**2).round()
        upper = (weights / UNIT).round()
        device = self.mean.device
        return upper.float().to(device), (weights - upper * UNIT).float().to(device)


def _rows_first(pixels: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return _along_columns(_along_rows(pixels, *weights[:2]), *weights[2:])


def _columns_first(pixels: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return _along_rows(_along_columns(pixels, *weights[2:]), *weights[:2])


def _along_rows(pixels: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    return _whole(pixels @ upper.T, pixels @ lower.T)


def _along_columns(pixels: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    return _whole(upper @ pixels, lower @ pixels)


def _whole(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """The sums of both halves in grey values, rounded."""
    return ((upper + (lower / UNIT).floor() + UNIT / 2) / UNIT).floor().clamp(0, 255)


class Deployed(nn.Module):
    """The network for inference alone, with its preparation: uint8 (N, H, W, 3) to logits, float32 (N, classes)."""

    def __init__(self, network: nn.Module, about: About):
        super().__init__()
        self.prepare = Preparation(about["image_size"], about["mean"], about["std"])
        self.network = folded(without_projector(network))
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.prepare(images)).logits


def without_projector(network: nn.Module) -> nn.Module:
    """A copy without what it was distilled through, which its logits do not depend on; the network's own names stay."""
    network = copy.deepcopy(network)
    if isinstance(network, FeatureStudent):
        network.proj = nn.Identity()
    return network


def require(what: str, packages: tuple[str, ...]) -> None:
    """Ask for the optional packages that lack, by name. Raises UserError."""
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}; pip install {' '.join(missing)}")


# to bytes


def content(form: str, network: nn.Module, about: About) -> bytes:
    """The file of that form, a key of SUFFIXES. Raises UserError for a network that it can't take."""
    if form == "safetensors":
        return _safetensors(network, about)
    try:
        with _quiet():  # the exporters speak of themselves; what they wrote is checked
            program = _program(Deployed(network, about))
            return _onnx(program, about) if form == "onnx" else _pt2(program, about)
    except Exception as error:  # tracing, translating and writing raise anything
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        title = about["network"]
        raise UserError(f"{title} can't be written as {form} ({reason}); try --format safetensors") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without libraries' warnings, and their logs below errors."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _program(model: Deployed) -> torch.export.ExportedProgram:
    sizes = {"images": {axis: torch.export.Dim(name) for axis, name in enumerate(AXES)}}
    return torch.export.export(model, (torch.zeros(2, 37, 41, 3, dtype=torch.uint8),), dynamic_shapes=sizes)


def _onnx(program: torch.export.ExportedProgram, about: About) -> bytes:
    ends = {"input_names": ["images"], "output_names": ["logits"]}
    model = torch.onnx.export(program, (), dynamo=True, verbose=False, **ends).model_proto
    model.doc_string = "images: uint8 (N, H, W, 3), RGB, of any size; logits: float32 (N, classes)"
    numbered = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    names = dict(zip(numbered, AXES, strict=False))
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in names:
                    dim.dim_param = names[dim.dim_param]
        for node in graph.node:
            if not _is_of_the_network(node):
                node.name = f"{PREPARE}{node.name}"
            del node.metadata_props[:]  # paths of this machine, and more than half of a small network's file
    return _with_metadata(model, about)


def _graphs(graph: Any) -> Iterator[Any]:
    """The ONNX graph and the branches in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _with_metadata(model: Any, about: About) -> bytes:
    """The model's bytes, with what is told of it and the lowest IR version, which older runtimes ask for, too."""
    from onnx.helper import find_min_ir_version_for

    for key, value in checkpoint.to_metadata(about).items():
        model.metadata_props.add(key=key, value=value)
    model.ir_version = find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    return model.SerializeToString()


def _pt2(program: torch.export.ExportedProgram, about: About) -> bytes:
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # has paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={checkpoint.ABOUT: json.dumps(about)})
    return buffer.getvalue()


def _safetensors(network: nn.Module, about: About) -> bytes:
    import safetensors.torch

    state = without_projector(network).state_dict()
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return safetensors.torch.save(state, checkpoint.to_metadata(about))


def quantised(model: bytes, split: Split, about: About) -> bytes:
    """The ONNX model with int8 weights (a scale for each channel) and activations; the preparation stays as it is.

    split: the training images; activations' ranges are measured on some hundred of them, taken evenly.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxscript import ir

    number = min(len(split.labels), CALIBRATION_IMAGES)
    index = torch.linspace(0, len(split.labels) - 1, number).long()  # image files come sorted by class
    proto = onnx.load_from_string(model)
    nodes = [node.name for graph in _graphs(proto.graph) for node in graph.node]
    prepares = [name for name in nodes if name.startswith(PREPARE)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        images = _Calibration(pieces(split, index.split(CALIBRATION_BATCH)))
        # Unsigned activations, as the kernels for x86 want them: signed ones take thrice as long there. Weights of 7
        # bits: an x86 processor without VNNI adds two products in 16 bits, where those of 8 bits may not fit.
        options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        options["reduce_range"] = True
        with _quiet():  # it advises to fold batch norms and infer shapes, which is done already
            quantize_static(proto, path, images, nodes_to_exclude=prepares, **options)
        whole = ir.load(path)
    whole.graph.sort()  # onnxruntime's own order overlooks what a branch takes from around it
    proto = ir.to_proto(whole)
    del proto.metadata_props[:]
    return _with_metadata(proto, about)


def _is_of_the_network(node: Any) -> bool:
    """Whether a node of an exported `Deployed` is of its network, by the modules that the exporter notes it was in."""
    return any(note.key.endswith("name_scopes") and "'network" in note.value for note in node.metadata_props)


class _Calibration:
    """Images for onnxruntime, which asks for them batch by batch."""

    def __init__(self, batches: Iterator[torch.Tensor]):
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self._batches, None)
        return None if images is None else {"images": images.numpy()}


# from files


def opened(path: Path, device: str, trust: bool = False) -> Opened:
    """The model in the file: a checkpoint or weights of this project, or what `content` made of one.

    device: as --device has it, of a checkpoint's network; the others run on the CPU. trust: open a .pt2 file at all,
    which torch.export can't read as mere data. Raises UserError for a file that is missing, damaged, refused, or
    doesn't say its classes.
    """
    if path.suffix in (".onnx", ".pt2"):
        if not path.is_file():
            raise UserError(
                f"{path} {'is no regular file' if path.exists() else 'does not exist'}; export.py makes such files"
            )
        if device not in ("auto", "cpu"):
            raise UserError(f"--device {device}: {path} runs on the CPU here; leave the flag away")
    if path.suffix == ".onnx":
        return _opened_onnx(path)
    if path.suffix == ".pt2":
        if not trust:
            raise UserError(f"{path} could run code when it is opened: give --trust_pt2 if it is your own, or a .onnx")
        return _opened_pt2(path)
    _, about = checkpoint.read(path, "export.py and train.py make such files")
    recipe = jobs.of_network(Recipe(path.name, path.stem, "student", 1, 1), _told(path, about)["network"])
    return from_checkpoint(jobs.load(recipe, path), path, choose(device, "fp32").device)


def from_checkpoint(trained: jobs.Trained, path: Path, device: torch.device) -> Opened:
    """The trained network as it would be deployed. Raises UserError where its file doesn't say its classes."""
    about = _told(path, trained.about)
    model = Deployed(trained.network, about).to(device)

    @torch.inference_mode()
    def classify(images: torch.Tensor) -> torch.Tensor:
        return model(images.to(device)).cpu()

    return Opened(classify, about)


def _opened_onnx(path: Path) -> Opened:
    require(str(path), ("onnxruntime",))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal ones: what fails is raised as well
    try:
        # By its content, as onnxruntime takes no path that is not UTF-8.
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        about = checkpoint.from_metadata(session.get_modelmeta().custom_metadata_map)
        flows = [
            [(flow.name, flow.type, len(flow.shape or ())) for flow in way]
            for way in (session.get_inputs(), session.get_outputs())
        ]
    except Exception as error:  # onnxruntime's own, which have no class in common
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is damaged, or no ONNX model that onnxruntime can run: {reason}") from None
    about = _told(path, about)
    if flows != [[("images", "tensor(uint8)", 4)], [("logits", "tensor(float)", 2)]]:
        raise UserError(
            f"{path} does not take uint8 images of 4 axes and give float logits of 2, as export.py's models do"
        )

    def classify(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return Opened(_checked(classify, path, about), about)


def _opened_pt2(path: Path) -> Opened:
    extra = {checkpoint.ABOUT: ""}
    try:
        with _quiet():
            model = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra).module()
        about = checkpoint.parsed_about(extra[checkpoint.ABOUT]) if extra[checkpoint.ABOUT] else None
    except Exception as error:  # of all kinds
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged, or no program of torch.export") from None
    about = _told(path, about)
    return Opened(_checked(torch.inference_mode()(model), path, about), about)


def _checked(classify: Classify, path: Path, about: About) -> Classify:
    """The function; it raises UserError where the file can't be run or gives anything but a logit for each class."""

    def checked(images: torch.Tensor) -> torch.Tensor:
        try:
            logits = classify(images)
        except Exception as error:  # of all kinds
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{path} can't be run on images of {images.shape[2]}x{images.shape[1]} pixels: {reason}"
            ) from None
        wanted = (len(images), len(about["classes"]))
        if not isinstance(logits, torch.Tensor) or logits.dtype != torch.float32 or logits.shape != wanted:
            raise UserError(f"{path} does not give a float32 logit for each of the {wanted[1]} classes that it names")
        return logits

    return checked


def _told(path: Path, about: About | None) -> About:
    if about is None:
        raise UserError(f"{path} says nothing of its classes; give a checkpoint or an export of this project's")
    return about


# over many images


def pieces(split: Split, parts: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """The split's images of each part (int64 indices), uint8 (B, H, W, 3)."""
    if isinstance(split.images, ImageFiles):
        return split.images.read(parts)
    return (split.images[part] for part in parts)


def logits_of(classify: Classify, split: Split, first: int | None = None) -> torch.Tensor:
    """Logits (N, classes) of the split's images in order, or of so many of them."""
    index = torch.arange(len(split.labels))[:first]
    return torch.cat([classify(images) for images in pieces(split, index.split(inference_batch(torch.device("cpu"))))])
