"""Weights to and from disk: plain state_dicts, written atomically, checked when read, as data and never as code.

A checkpoint is a zip file, as torch.save writes it, with one member more, about.json, which says what the figures of
the weights depend on besides them, and with a comment at its end: the SHA-256 of all before the comment. torch.load and
every other reader of PyTorch's files skip both. What other programs write loads as well: weights within a dict, under
prefixes, among bookkeeping, in safetensors.
"""

import argparse
import hashlib
import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy
import torch
from torchvision.models import ResNet50_Weights

from models import TITLES, CifarResNet
from util.files import replacing, sha256
from util.runtime import UserError, say

# Another layout of a feature student, that of a network cut into a torch.nn.Sequential.
LEGACY_PREFIXES = {
    "base.0.": "conv1.",
    "base.1.": "bn1.",
    "base.4.": "layer1.",
    "base.5.": "layer2.",
    "base.6.": "layer3.",
    "base.7.": "layer4.",
}

ZIP_START, ZIP_END = b"PK\x03\x04", b"PK\x05\x06"  # signatures of the first record, and of the last
ZIP_END_SIZE = 22  # of the last record; its last two bytes are the length of the comment that follows
SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + 64

# Any of these loads as any other.
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

# Under which names people keep the weights within a dict; the first that is there is taken.
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "student", "teacher", "backbone", "ema", "state_dict_ema", "model_ema", "ema_state_dict",
)  # fmt: skip

# Entries that are no weights: of thop, of averaged models, of losses and measures that were part of a module.
BOOKKEEPING = re.compile(
    r"(.*\.)?(total_ops|total_params)|n_averaged|epoch|step|global_step|iteration|best_\w+"
    r"|(criterion|loss|loss_fn|loss_function|(train|val|valid|test)_(acc|accuracy|loss|metric\w*)|metrics?)\..*"
)

# Plain types that people's scripts keep beside the weights. None can do more than hold values.
PLAIN_TYPES = [
    argparse.Namespace,
    numpy.dtype,
    *(kind for kind in vars(numpy.dtypes).values() if isinstance(kind, type)),
]
PLAIN_TYPES += [numpy._core.multiarray.scalar, (numpy._core.multiarray.scalar, "numpy.core.multiarray.scalar")]

SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# How files begin that people take for a checkpoint.
OTHER_FILES = {
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
    b"<!doctype": "a page of HTML, not the download it was to be",
    b"<html": "a page of HTML, not the download it was to be",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}

StateDict = dict[str, torch.Tensor]
About = dict[str, Any]

# What about.json must hold; it may hold more.
ABOUT = {"network": str, "stem": str, "classes": list, "image_size": int, "mean": list, "std": list}


class Holds(NamedTuple):
    """What a state_dict is of: one of models.TITLES, or "network of another kind"; its classes, None where unknown.

    stem: "small" (conv1 3x3) or "standard" (conv1 7x7).
    """

    title: str
    classes: int | None
    stem: str


def save(network: torch.nn.Module, path: Path, about: About | None = None) -> None:
    """Write the network's state_dict to `path`, atomically, as plain contiguous tensors on the CPU.

    about: what its figures depend on besides, plain values, kept in the file.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if about is not None:
        with zipfile.ZipFile(buffer, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(zipfile.ZipInfo(f"{root}/about.json"), json.dumps(about, indent=1))
    buffer.seek(-2, io.SEEK_END)
    buffer.write(struct.pack("<H", SEAL_SIZE))
    with replacing(path) as file:
        file.write(buffer.getbuffer())
        file.write(_seal(buffer.getbuffer()))


def _seal(content: bytes | memoryview) -> bytes:
    """The comment that goes with the content before it."""
    return SEAL + hashlib.sha256(content).hexdigest().encode()


def read(path: Path, hint: str) -> tuple[StateDict, About | None]:
    """The state_dict in the file, whatever the network, and what the file says of it, if it does.

    hint: what to do where the file is missing. Raises UserError for a file that is missing, damaged, no state_dict, or
    a pickle that would run code (not run).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {hint}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if other := _other_kind(content):
        raise UserError(f"{path} is {other}")
    try:
        if _is_safetensors(content):
            return _from_safetensors(content), None
        checked, about = _checked(content)
        with torch.serialization.safe_globals(PLAIN_TYPES):
            value = torch.load(io.BytesIO(checked), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():  # it names something to import: a class, or a function to call
            raise UserError(_refusal(path, str(error))) from None
        raise UserError(f"{path} is damaged, or not a checkpoint of PyTorch; {hint}") from None
    except Exception:  # unzipping, unpickling and rebuilding tensors raise whatever the bytes lead them to
        raise UserError(f"{path} is damaged (cut short?), or not a checkpoint of PyTorch; {hint}") from None
    return _weights(value, path), about


def _other_kind(content: bytes) -> str:
    """What the file is where it is plainly something else; "" where it may be a checkpoint."""
    if not content:
        return "empty"
    start = content[:32].lstrip().lower()
    for sign, kind in OTHER_FILES.items():
        if start.startswith(sign.lower()):
            return kind
    if (
        content.startswith(ZIP_START)
        and b"/constants.pkl" in content[-(1 << 20) :]
        and b"/code/" in content[-(1 << 20) :]
    ):
        return "a TorchScript archive, whose code is not run; save the model's state_dict()"
    return ""


def _refusal(path: Path, error: str) -> str:
    name = re.search(r"GLOBAL ([\w.]+)", error)
    if name and re.match(r"(torch\.nn|torchvision|timm|models?|resnet)\b", name[1]):
        return f"{path} holds a whole model ({name[1]}), which could run code: refused. Save model.state_dict()"
    return f"{path} holds more than tensors and could run code: refused. Save a state_dict"


def _checked(content: bytes) -> tuple[bytes, About | None]:
    """The content, for torch to read, and its about.json. Raises ValueError, or what zipfile raises, where it is not as
    it was written.

    In torch's older format, which is no zip file, nothing can be checked.
    """
    end = content[-SEAL_SIZE:]
    sealed = end.startswith(SEAL)
    if sealed and end != _seal(memoryview(content)[:-SEAL_SIZE]):
        raise ValueError("its checksum does not fit")
    if not content.startswith(ZIP_START):
        return content, None
    end = content[-ZIP_END_SIZE:]
    if not sealed and not (end.startswith(ZIP_END) and end.endswith(b"\0\0")):
        raise ValueError("its end is missing")
    return _rewritten(content)


def _rewritten(content: bytes) -> tuple[bytes, About | None]:
    """The zip file's members, their CRC-32s checked, in another zip file. Raises as `_checked` does.

    torch's reader checks no CRC-32, and what it makes of a damaged directory of members differs from what zipfile
    makes of it: it returns memory as it happens to be for one that is marked as a folder. So it gets a sound one.
    """
    copy, about = io.BytesIO(), None
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(copy, "w") as writer:
        members = archive.infolist()
        # None of these is from torch.save. Compressed or overlapping members could fill the memory from a small file.
        if any(member.compress_type != zipfile.ZIP_STORED or member.is_dir() for member in members):
            raise ValueError("a member is compressed, or a folder")
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its members overlap")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two members have the same name")
        for member in members:
            if member.filename.endswith("/about.json"):
                about = _about(archive.read(member))
            else:
                writer.writestr(member.filename, archive.read(member))
    return copy.getvalue(), about


def _about(text: bytes) -> About:
    about = json.loads(text)
    for key, kind in ABOUT.items():
        if not isinstance(about, dict) or not isinstance(about.get(key), kind):
            raise ValueError(f"{key} of its about.json is missing or wrong")
    return about


def _is_safetensors(content: bytes) -> bool:
    size = int.from_bytes(content[:8], "little")
    return len(content) > 9 and content[8:9] == b"{" and size < 1 << 27


def _from_safetensors(content: bytes) -> StateDict:
    """The tensors of a safetensors file: a header's length, the header in JSON, the data. Raises ValueError."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size], object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    data, end, state = content[8 + size :], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (start, stop) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = 1
        for length in shape:
            count *= length
        # As the format has it: one behind the other, without holes.
        if start != end or stop - start != count * kind.itemsize or min(shape, default=0) < 0 or stop > len(data):
            raise ValueError(f"{name} does not lie where its shape says")
        values = torch.frombuffer(bytearray(data[start:stop]), dtype=kind) if count else torch.empty(0, dtype=kind)
        state[name], end = values.reshape(shape), stop
    if end != len(data) or not state:
        raise ValueError("there is more, or less, than the header says")
    return state


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("two entries have the same name")
    return dict(pairs)


def _weights(value: object, path: Path) -> StateDict:
    """The state_dict in what a file held: itself, or within a dict. Raises UserError where there is none."""
    found = dict(_state_dicts(value))
    if not found:
        raise UserError(f"{path} is not a state_dict (names to plain tensors), nor does it hold one")
    order = {name: place for place, name in enumerate(WRAPPERS)}
    name = min(found, key=lambda name: order.get(name.rpartition("/")[2], len(order)))
    if len(found) > 1:
        say(f"{path} holds weights as {', '.join(found)}: those of {name} are taken")
    return found[name]


def _state_dicts(value: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, StateDict]]:
    """The state_dicts within nested dicts, each with its path in them."""
    if not isinstance(value, dict) or depth > 2:
        return
    items = list(dict.items(value))  # not value.items(): a file can give an OrderedDict attributes, hiding methods
    if not all(isinstance(key, str) and key.isprintable() for key, _ in items):
        return
    tensors = {key: tensor for key, tensor in items if isinstance(tensor, torch.Tensor)}
    if any(tensor.ndim > 0 for tensor in tensors.values()):  # and not the best accuracy so far, as a tensor
        # What lies beside weights and is none (an epoch, an accuracy) does not matter; a tensor that is odd does.
        if all(_is_plain(tensor) for tensor in tensors.values()):
            # Detached, they are without the attributes that a file can give them, which would hide their methods.
            yield name, {key: torch.Tensor.detach(tensor) for key, tensor in tensors.items()}
        return
    for key, part in items:
        yield from _state_dicts(part, f"{name}/{key}" if name else key, depth + 1)


def _is_plain(value: object) -> bool:
    """Whether it is a tensor that is dense and has its data: neither sparse, nested nor meta."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def describe(state: StateDict) -> Holds:
    """What the state_dict is of, whichever way its names are written."""
    state = _modern(state)
    stem = "standard" if "conv1.weight" in state and tuple(state["conv1.weight"].shape[2:]) == (7, 7) else "small"
    classes = state["fc.bias"].numel() if "fc.bias" in state else None
    return Holds(_architecture(state), classes, stem)


def load(network: CifarResNet, kind: str, path: Path, hint: str) -> CifarResNet:
    """Load the file into the network of that kind ("teacher", "student", "feature_student"), strictly.

    Both layouts of a feature student load. Raises UserError as `read` does, and for a checkpoint of another
    architecture or another number of classes; then the network is as it was.
    """
    state, _ = read(path, hint)
    fit_into(network, kind, state, path)
    return network


def fit_into(network: CifarResNet, kind: str, state: StateDict, path: Path) -> None:
    """Load a state_dict that was read from the path, as `load` does."""
    holds = describe(state)
    if kind in TITLES and holds.title != TITLES[kind]:
        raise UserError(f"{path} holds a {holds.title}, not the {TITLES[kind]} needed here")
    wanted = network.fc.out_features
    if holds.classes not in (None, wanted):
        raise UserError(f"{path} tells {holds.classes} classes apart, the data set has {wanted}")
    _load_strictly(network, state, path)


def start_teacher(network: CifarResNet, source: str) -> None:
    """The teacher's start: all but conv1 and fc from `source`, "imagenet", or a file in torchvision's format.

    "none" leaves the random weights. Raises UserError where the weights can't be had or are of another network.
    """
    if source == "none":
        return
    path = _imagenet_file() if source == "imagenet" else Path(source).expanduser()
    state, _ = read(path, "give --weights a state_dict of torchvision's ResNet-50, or none")
    holds = describe(state)
    if holds.title != TITLES["teacher"]:
        raise UserError(f"--weights {path} holds a {holds.title}, not a ResNet-50")
    fresh = {key: value for key, value in network.state_dict().items() if key.startswith(("conv1.", "fc."))}
    _load_strictly(network, {**_modern(state), **fresh}, path)


def _imagenet_file() -> Path:
    """torchvision's ImageNet weights on the disk, downloaded and checked against their hash where they are not yet."""
    url = ResNet50_Weights.IMAGENET1K_V2.url
    name = Path(urlparse(url).path).name
    path, prefix = Path(torch.hub.get_dir()) / "checkpoints" / name, Path(name).stem.rpartition("-")[2]
    broken = path.exists() and not sha256(path).startswith(prefix)
    if path.exists() and not broken:
        return path
    if broken:
        say(f"{path} is cut short or not what its name says; it is downloaded anew")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:  # no network; a wrong hash
        first = f"delete {path}, which is damaged, and " if broken else ""
        raise UserError(
            f"cannot download the ImageNet weights ({error}); {first}put {name} (from {url}) into {path.parent}, "
            "or give --weights FILE, or --weights none"
        ) from None
    return path


def _modern(state: StateDict) -> StateDict:
    """The state_dict by torchvision's names: without bookkeeping, common prefixes, and the older layout's names."""
    state = _stripped(state)

    def rename(key: str) -> str:
        prefix = key[:7]
        return LEGACY_PREFIXES[prefix] + key[7:] if prefix in LEGACY_PREFIXES else key

    return {rename(key): value for key, value in state.items()}


def _stripped(state: StateDict) -> StateDict:
    """The state_dict without entries that are no weights, and without the prefixes that all its names share."""
    state = {key: value for key, value in state.items() if not BOOKKEEPING.fullmatch(key)}
    while state:
        prefixes = {key.partition(".")[0] for key in state}
        if len(prefixes) > 1 or not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def _architecture(state: StateDict) -> str:
    """What the state_dict is of: one of models.TITLES, or "network of another kind"."""
    if not {"conv1.weight", "fc.weight", "fc.bias", "layer4.1.conv1.weight"} <= state.keys():
        return "network of another kind"
    blocks = [sum(f"layer{i}.{j}.conv1.weight" in state for j in range(40)) for i in range(1, 5)]
    if "layer1.0.conv3.weight" in state:
        return TITLES["teacher"] if blocks == [3, 4, 6, 3] else "network of another kind"
    if blocks != [2, 2, 2, 2]:
        return "network of another kind"
    return TITLES["feature_student" if "proj.weight" in state else "student"]


def _load_strictly(network: CifarResNet, state: StateDict, path: Path) -> None:
    """Load it, or raise UserError for keys, shapes or types that are not the network's, which then is as it was."""
    expected = network.state_dict()
    # A network of the user's own may have a prefix common to all its names, or call a part of itself "loss".
    state = dict(state) if expected.keys() == state.keys() else _modern(state)
    # Counters that nothing here reads, and that older and other programs do not keep.
    state |= {key: value for key, value in expected.items() if key not in state and key.endswith("num_batches_tracked")}
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has {surplus[0]} besides"
        raise UserError(f"{path} does not fit the network: it {what}")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            shapes = f"{tuple(state[key].shape)}, not {tuple(value.shape)}"
            raise UserError(f"{path} does not fit the network: {key} has the shape {shapes}")
        if state[key].dtype != value.dtype and not {state[key].dtype, value.dtype} <= FLOATS:
            raise UserError(f"{path} does not fit the network: {key} is of {state[key].dtype}, not {value.dtype}")
        if not state[key].isfinite().all():
            raise UserError(f"{path} holds NaN or infinity in {key}: its training diverged; use another checkpoint")
    network.load_state_dict(state)
