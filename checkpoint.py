"""Weights to and from disk: plain state_dicts, written atomically, checked when read, as data and never as code.

A checkpoint is a zip file, as torch.save writes it, with a comment at its end: the SHA-256 of all before the comment.
"""

import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import ResNet50_Weights

from models import TITLES, CifarResNet
from util.files import replacing
from util.runtime import UserError

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

State = dict[str, torch.Tensor]


def save(network: torch.nn.Module, path: Path) -> None:
    """Write the network's state_dict to `path`, atomically, as plain contiguous tensors on the CPU."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(struct.pack("<H", SEAL_SIZE))
    with replacing(path) as file:
        file.write(buffer.getbuffer())
        file.write(_seal(buffer.getbuffer()))


def _seal(content: bytes | memoryview) -> bytes:
    """The comment that goes with the content before it."""
    return SEAL + hashlib.sha256(content).hexdigest().encode()


def read(path: Path, hint: str) -> State:
    """The state_dict in the file, whatever the network; `hint` says what to do where the file is missing.

    Raises UserError for a file that is missing, damaged, no state_dict, or a pickle that would run code (not run).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {hint}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        state = torch.load(io.BytesIO(_checked(content)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():  # it names something to import: a class, or a function to call
            raise UserError(f"{path} holds more than tensors and could run code: refused. Save a state_dict") from None
        raise UserError(f"{path} is damaged, or not a checkpoint of PyTorch; {hint}") from None
    except Exception:  # unzipping, unpickling and rebuilding tensors raise whatever the bytes lead them to
        raise UserError(f"{path} is damaged (cut short?), or not a checkpoint of PyTorch; {hint}") from None
    if not _is_state_dict(state):
        raise UserError(f"{path} is not a state_dict (names to plain tensors)")
    return dict(dict.items(state))


def _checked(content: bytes) -> bytes:
    """The content, for torch to read. Raises ValueError, or what zipfile raises, where it is not as it was written.

    In torch's older format, which is no zip file, nothing can be checked.
    """
    end = content[-SEAL_SIZE:]
    sealed = end.startswith(SEAL)
    if sealed and end != _seal(memoryview(content)[:-SEAL_SIZE]):
        raise ValueError("its checksum does not fit")
    if not content.startswith(ZIP_START):
        return content
    end = content[-ZIP_END_SIZE:]
    if not sealed and not (end.startswith(ZIP_END) and end.endswith(b"\0\0")):
        raise ValueError("its end is missing")
    return _rewritten(content)


def _rewritten(content: bytes) -> bytes:
    """The zip file's members, their CRC-32s checked, in another zip file. Raises as `_checked` does.

    torch's reader checks no CRC-32, and what it makes of a damaged directory of members differs from what zipfile
    makes of it: it returns memory as it happens to be for one that is marked as a folder. So it gets a sound one.
    """
    copy = io.BytesIO()
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
            writer.writestr(member.filename, archive.read(member))
    return copy.getvalue()


def _is_state_dict(value: object) -> bool:
    """Whether it maps names, fit for a line of text, to plain tensors, and at least one."""
    if not isinstance(value, dict) or not value:
        return False
    items = dict.items(value)  # not value.items(): a file can give an OrderedDict attributes, which would hide methods
    return all(isinstance(key, str) and key.isprintable() and _is_plain(tensor) for key, tensor in items)


def _is_plain(value: object) -> bool:
    """Whether it is a tensor that is dense and has its data: neither sparse, nested nor meta."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def load(network: CifarResNet, kind: str, path: Path, hint: str) -> CifarResNet:
    """Load the file into the network of that kind ("teacher", "student", "feature_student"), strictly.

    Both layouts of a feature student load. Raises UserError as `read` does, and for a checkpoint of another
    architecture or another number of classes; then the network is as it was.
    """
    state = _modern(read(path, hint))
    holds = _architecture(state)
    if holds != TITLES[kind]:
        raise UserError(f"{path} holds a {holds}, not the {TITLES[kind]} needed here")
    classes, wanted = state["fc.bias"].shape.numel(), network.fc.out_features
    if classes != wanted:
        raise UserError(f"{path} tells {classes} classes apart, the data set has {wanted}")
    _load_strictly(network, state, path)
    return network


def start_teacher(network: CifarResNet, source: str) -> None:
    """The teacher's start: all but conv1 and fc from `source`, "imagenet", or a file in torchvision's format.

    "none" leaves the random weights. Raises UserError where the weights can't be had or are of another network.
    """
    if source == "none":
        return
    path = _imagenet_file() if source == "imagenet" else Path(source)
    state = read(path, "give --weights a state_dict of torchvision's ResNet-50, or none")
    if _architecture(state) != TITLES["teacher"]:
        raise UserError(f"--weights {path} holds a {_architecture(state)}, not a ResNet-50")
    fresh = {key: value for key, value in network.state_dict().items() if key.startswith(("conv1.", "fc."))}
    _load_strictly(network, {**state, **fresh}, path)


def _imagenet_file() -> Path:
    """torchvision's ImageNet weights on the disk, downloaded and checked against their hash where they are not yet."""
    url = ResNet50_Weights.IMAGENET1K_V2.url
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:  # no network; a wrong hash
            raise UserError(
                f"cannot download the ImageNet weights ({error}); put {name} (from {url}) into {path.parent}, "
                "or give --weights FILE, or --weights none"
            ) from None
    return path


def _modern(state: State) -> State:
    """The state_dict with the older layout's names replaced by torchvision's."""

    def rename(key: str) -> str:
        prefix = key[:7]
        return LEGACY_PREFIXES[prefix] + key[7:] if prefix in LEGACY_PREFIXES else key

    return {rename(key): value for key, value in state.items()}


def _architecture(state: State) -> str:
    """What the state_dict is of: one of models.TITLES, or "network of another kind"."""
    if not {"conv1.weight", "fc.weight", "fc.bias", "layer4.1.conv1.weight"} <= state.keys():
        return "network of another kind"
    blocks = [sum(f"layer{i}.{j}.conv1.weight" in state for j in range(40)) for i in range(1, 5)]
    if "layer1.0.conv3.weight" in state:
        return TITLES["teacher"] if blocks == [3, 4, 6, 3] else "network of another kind"
    if blocks != [2, 2, 2, 2]:
        return "network of another kind"
    return TITLES["feature_student" if "proj.weight" in state else "student"]


def _load_strictly(network: CifarResNet, state: State, path: Path) -> None:
    """Load it, or raise UserError for keys, shapes or types that are not the network's, which then is as it was."""
    expected = network.state_dict()
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
    network.load_state_dict(state)
