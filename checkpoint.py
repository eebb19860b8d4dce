"""Weights to and from disk: plain state_dicts, written atomically, checked when read, as data and never as code.

A checkpoint is a zip file, as torch.save writes it, with a comment at its end: the SHA-256 of all before the comment.
One more member, about.json, says what a test's figures depend on besides the weights. What others write is read, too:
weights inside a dict, under prefixed names, beside what a training keeps, in torch's older format, as safetensors.
"""

import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torchvision.models import get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

import models
from models import TITLES
from util import parsed, runstate
from util.bounds import IMAGE_SIDE, MEAN, STD
from util.files import ensure_regular, replacing, sha256
from util.runtime import UserError, is_out_of_memory, say
from zoo import library_models

OTHER = "network of another kind"

# Another layout of a feature student, that of a network cut into a torch.nn.Sequential.
LEGACY_PREFIXES = {
    "base.0.": "conv1.",
    "base.1.": "bn1.",
    "base.4.": "layer1.",
    "base.5.": "layer2.",
    "base.6.": "layer3.",
    "base.7.": "layer4.",
}

# What people call the weights in a dict of theirs; where it holds several that fit, the first of these is taken.
WRAPPERS = [
    *("state_dict", "model", "net", "network", "model_state_dict", "model_state", "weights", "student", "teacher"),
    *("ema", "state_dict_ema", "model_ema", "ema_model", "params"),
]

# Entries that are no weights, wherever they are: of thop's counting, of torch.optim.swa_utils, of batch norm.
COUNTERS = {"total_ops", "total_params", "n_averaged", "num_batches_tracked"}
# Modules beside the network in the module that trained it; they don't change its outputs.
OBJECTIVES = {
    *("criterion", "criterions", "loss", "losses", "loss_fn", "loss_func", "loss_function", "metric", "metrics"),
    *("accuracy", "acc", "confmat", "ce"),
}
WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")  # at the start of a name, by torch itself
OF_A_PHASE = re.compile(r"(train|val|valid|validation|test)_\w+|\w+_(loss|criterion|loss_fn)")  # such modules' names
# The last part of the name of a student or a teacher in the module that distils, and what normalises its images there.
DISTILLED = re.compile(r"(^|\.)((student|teacher)(_\w+)?|\w+_(s|t|student|teacher))$")
PREPROCESSOR = re.compile(r"(^|\.)data_preprocessor\.(mean|std)$")
# A training's notes among the weights.
NOTES = {
    *("epoch", "epochs", "step", "global_step", "iter", "iteration", "iterations", "acc", "acc1", "loss", "lr"),
    *("best", "best_acc", "best_acc1", "best_top1", "best_prec1", "best_loss", "best_epoch", "seed"),
    *("optimizer", "scheduler", "lr_scheduler", "scaler", "amp", "rng_state", "cuda_rng_state"),
    *("arch", "args", "config", "cfg", "opt", "name", "version"),
}

ZIP_START, ZIP_END = b"PK\x03\x04", b"PK\x05\x06"  # signatures of the first record, and of the last
ZIP_END_SIZE = 22  # of the last record; its last two bytes are the length of the comment that follows
SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + 64
ROOT, ABOUT = "archive", "about.json"  # the folder in which torch.save puts the members, and ours

OLDER_FORMAT = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number at the start of a file in torch's format before the zip files
PICKLE_PROTOCOL = 2  # the one that torch reads as data

# How files begin that are taken for checkpoints, and what they are.
FOREIGN = {
    rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|body)": "an HTML page: the download failed; fetch the file itself",
    rb"(\xef\xbb\xbf)?\s*<\?xml": "an XML text: the download failed, if it should be weights; fetch the file itself",
    rb"version https://git-lfs": "a git-lfs pointer and not the file itself; fetch that with: git lfs pull",
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it, not a checkpoint of PyTorch",
    rb"\x1f\x8b|\xfd7zXZ|BZh\d|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!": "a compressed file; unpack it first",
    rb".{257}ustar": "a tar archive; unpack it first",
    rb"\x08[\x03-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]": "an ONNX model, not a checkpoint of PyTorch",
    rb"\x08\x01\x12|\n[^\n]{1,2}\n.[\w/]+\x12.[A-Z]\w+": "a TensorFlow model, not a checkpoint of PyTorch",
    rb"....TFL3": "a TensorFlow Lite model, not a checkpoint of PyTorch",
    rb"\x93NUMPY": "a NumPy array, not a checkpoint of PyTorch",
    runstate.MAGIC: "the state of a run that was not finished; finish that with --resume, which makes its checkpoint",
    rb"GGUF": "a GGUF file, not a checkpoint of PyTorch",
}

# Any of these loads as any other.
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

SAFETENSORS_HEADER = 100_000_000  # bytes that the format allows for it
SAFETENSORS_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}

KEPT = {"network", "classes", "image_size", "mean", "std"}  # of about.json, what every file of this project tells
# What the values of about.json may be. The bounds keep arithmetic in float32 finite.
ABOUT_CHECKS = {
    "network": lambda value: parsed.text(value) and value.count("+") <= 1,
    "classes": lambda value: parsed.list_of(parsed.text)(value) and len(set(value)) == len(value),
    "image_size": IMAGE_SIDE.fits,
    "mean": parsed.list_of(MEAN.fits, 3, 3),
    "std": parsed.list_of(STD.fits, 3, 3),
    "stem": lambda value: value in models.STEMS,
    "job": parsed.text,
    "run": parsed.a_dict,
}

DEPTH = 20  # of the steps in a name, how many are looked at for a prefix

State = dict[str, torch.Tensor]
About = dict[str, Any]


def save(network: torch.nn.Module, path: Path, about: About | None = None) -> str:
    """Write the network's state_dict to `path`, atomically, as plain contiguous tensors on the CPU. Return its SHA-256.

    about: what travels with it, of JSON's types: classes (names), image_size, mean, std, stem, network, and more.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if about is not None:
        text = json.dumps(about, allow_nan=False)  # in ASCII, as a name that is not UTF-8 has no other spelling
        parsed_about(text)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(zipfile.ZipInfo(f"{ROOT}/{ABOUT}"), text)  # of 1980: equal weights make equal files
    buffer.seek(-2, io.SEEK_END)
    buffer.write(struct.pack("<H", SEAL_SIZE))
    digest = hashlib.sha256()
    with replacing(path) as file:
        for part in (buffer.getbuffer(), _seal(buffer.getbuffer())):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _seal(content: bytes | memoryview) -> bytes:
    """The comment that goes with the content before it."""
    return SEAL + hashlib.sha256(content).hexdigest().encode()


class _Flawed(ValueError):
    """What a file says of its network is not as `save` writes it; says which part."""


def parsed_about(text: str | bytes) -> About:
    """What about.json says. Raises _Flawed where it is not as `save` writes it."""
    try:
        about = parsed.loads(text)
    except ValueError as error:
        raise _Flawed(f"its {ABOUT} can't be read ({error})") from None
    if not isinstance(about, dict):
        raise _Flawed(f"its {ABOUT} is no JSON object")
    if flaw := parsed.flaw(about, ABOUT_CHECKS, KEPT):
        raise _Flawed(f"{flaw} in its {ABOUT} is missing or wrong")
    return about


def to_metadata(about: About) -> dict[str, str]:
    """`about` as formats keep metadata, text under names: each value as JSON."""
    return {key: json.dumps(value, allow_nan=False) for key, value in about.items()}


def from_metadata(metadata: dict[str, str] | None) -> About | None:
    """What `to_metadata` wrote; None where it is another program's, which has none of its keys.

    Raises ValueError where it is not as it was written.
    """
    if not isinstance(metadata, dict) or not KEPT & metadata.keys():
        return None
    about = {}
    for key, value in metadata.items():
        try:
            about[key] = parsed.loads(value)
        except (ValueError, TypeError) as error:
            if key in ABOUT_CHECKS:  # others may be another program's notes
                raise _Flawed(f"{key} in its metadata can't be read ({error})") from None
    return parsed_about(json.dumps(about))


class _Foreign(Exception):
    """The file is whole as far as one can see, but not a checkpoint; says what it is."""


def read(path: Path, hint: str, kind: str | None = None, key: str | None = None) -> tuple[State, About | None]:
    """The weights in the file, whatever the network, and what travels with them, None where nothing does.

    hint: what to do where the file is missing. kind: the network by its name, whose weights are taken where
    the file holds several networks'. key: the name of the set of weights that is taken of several. Names are without
    the prefix under which the network lies, and in torchvision's layout; bookkeeping tensors among the weights stay,
    for `fit_into` to judge.

    Raises UserError for a file that is missing, damaged, no state_dict, or a pickle that would run code (not run).
    """
    return read_hashed(path, hint, kind, key)[:2]


def read_hashed(
    path: Path, hint: str, kind: str | None = None, key: str | None = None, start: bool = False
) -> tuple[State, About | None, str]:
    """Return what `read` does, and the SHA-256 of the bytes that it is from: the file may be another one afterwards.

    start: the weights are a start, so what lies beside the network, a projector or another head, is left out.
    """
    value, about, content = _opened(path, hint)
    state = _plain(value if _is_sealed(content) else _taken(value, path, kind, key, start=start), path)
    return state, about, hashlib.sha256(content).hexdigest()


def network_in(path: Path, key: str | None = None, row: str | None = None) -> str | None:
    """The network in the file by its name, as the file says or its weights show; None where neither does.

    row: the network that is taken where the file holds it beside others.
    """
    try:
        value, about, content = _opened(path, "")
    except UserError:  # which `read` raises again, knowing the network and the hint
        return None
    if about:
        return about["network"]
    for kind in (row, None) if row else (None,):
        try:
            entries = _plain(value, path) if _is_sealed(content) else _taken(value, path, kind, key, tells=False)
        except UserError:
            continue
        holds = next((name for name, called in TITLES.items() if called == _architecture(entries)), None)
        if holds and kind in (None, holds):
            return holds
    return None


def _is_sealed(content: bytes) -> bool:
    """Whether the file was made here."""
    return content[-SEAL_SIZE:].startswith(SEAL)


def _opened(path: Path, hint: str) -> tuple[Any, About | None, bytes]:
    """What the file holds, its about.json, and its bytes. Raises UserError as `read` does."""
    try:
        ensure_regular(path)
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {hint}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        value, about = _parsed(content, path.suffix)
    except _Foreign as error:
        raise UserError(f"{path} is {error}") from None
    except pickle.UnpicklingError as error:
        refused = _code_in(content, str(error))
        raise UserError(f"{path} {refused or f'is damaged, or not a checkpoint of PyTorch; {hint}'}") from None
    except _Flawed as error:
        raise UserError(f"{path} is damaged: {error}; {hint}") from None
    except Exception as error:  # unzipping, unpickling and rebuilding tensors raise whatever the bytes lead them to
        if is_out_of_memory(error):
            raise UserError(f"{path} can't be read: it takes more memory than there is") from None
        what = "a safetensors file" if _is_safetensors(content, path.suffix) else "not a checkpoint of PyTorch"
        joined = "damaged (cut short?): " if what.startswith("a ") else "damaged (cut short?), or "
        raise UserError(f"{path} is {joined}{what}; {hint}") from None
    return value, about, content


def _parsed(content: bytes, suffix: str) -> tuple[Any, About | None]:
    """What the file holds, tensors and what may be beside them, and its about.json.

    Raises _Foreign, UnpicklingError for what is not data, and anything for what is damaged.
    """
    if not content:
        raise _Foreign("empty")
    if not _is_safetensors(content):  # whose first bytes, a length, may be any
        for start, what in FOREIGN.items():
            if re.match(start, content[:512], re.DOTALL | re.IGNORECASE):
                raise _Foreign(what)
    if _is_safetensors(content, suffix):
        return _safetensors(content)
    content, about = _checked(content)
    with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of deprecated types and other protocols: what matters is said here
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), about and parsed_about(about)


def _checked(content: bytes) -> tuple[bytes, bytes | None]:
    """The content, for torch to read, and its about.json. Raises ValueError, or what zipfile raises, for damage.

    In torch's older format, which is no zip file, nothing can be checked.
    """
    end = content[-SEAL_SIZE:]
    sealed = end.startswith(SEAL)
    if sealed and end != _seal(memoryview(content)[:-SEAL_SIZE]):
        raise ValueError("its checksum does not fit")
    if not content.startswith(ZIP_START):
        if OLDER_FORMAT in content[:40]:
            _refuse_protocol(content)
        return content, None
    end = content[-ZIP_END_SIZE:]
    if not sealed and not (end.startswith(ZIP_END) and end.endswith(b"\0\0")):
        raise ValueError("its end is missing")
    return _rewritten(content)


def _rewritten(content: bytes) -> tuple[bytes, bytes | None]:
    """The zip file's members, their CRC-32s checked, in another zip file, and about.json. Raises as `_checked` does.

    torch's reader checks no CRC-32, and what it makes of a damaged directory of members differs from what zipfile
    makes of it: it returns memory as it happens to be for one that is marked as a folder. So it gets a sound one.
    """
    copy, about = io.BytesIO(), None
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(copy, "w") as writer:
        members = archive.infolist()
        inner = {member.filename.partition("/")[2] for member in members}
        if "constants.pkl" in inner:
            raise _Foreign("a TorchScript archive; save its state_dict() and give that")
        if "data.pkl" not in inner:
            raise _Foreign("a zip archive, but not a checkpoint of PyTorch; if there is one inside, unpack it")
        # None of these is from torch.save. Compressed or overlapping members could fill the memory from a small file.
        if any(member.compress_type != zipfile.ZIP_STORED or member.is_dir() for member in members):
            raise ValueError("a member is compressed, or a folder")
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its members overlap")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two members have the same name")
        for member in members:
            data, name = archive.read(member), member.filename.partition("/")[2]
            if name == "data.pkl":
                _refuse_protocol(data)
            if name == ABOUT:
                about = data
            else:
                writer.writestr(member.filename, data)
    return copy.getvalue(), about


def _refuse_protocol(content: bytes) -> None:
    """Raise _Foreign for a pickle of a protocol that torch does not read as data."""
    if content[:1] == b"\x80" and PICKLE_PROTOCOL < content[1] <= pickle.HIGHEST_PROTOCOL:
        raise _Foreign(f"saved with pickle_protocol={content[1]}, which is not read; leave it out in torch.save")


def _code_in(content: bytes, error: str) -> str | None:
    """What the file has that can't be read as data, if that is what the unpickler's error is about."""
    named = re.search(r"GLOBAL (\S{1,80}) w", error)
    if re.search(rb"ctorch\.nn\.modules\.(?!loss\b)", content):
        return "holds a whole model, which could run code: refused. Save model.state_dict() and give that"
    if not content.startswith(ZIP_START) and OLDER_FORMAT not in content[:40] and content.endswith(b"."):
        return "is a pickle, not of torch.save, and could run code: refused. Save a state_dict with torch.save"
    if named and named[1].isprintable():
        return f"holds more than tensors ({named[1]}) and could run code: refused. Save a state_dict"
    if "global" in error.lower() or "must be imported to load" in error:
        return "holds more than plain tensors and could run code: refused. Save a state_dict"
    return None


def _stand_in(name: str, make: type | None = None) -> type:
    """A class that torch's unpickler takes for the one of that name: its objects are empty, or what `make` makes.

    So nothing of what the file names is imported or run, whatever the arguments and the state that it gives.
    """
    module, _, qualname = name.rpartition(".")
    members: dict[str, Any] = {"__module__": module, "__qualname__": qualname, "__slots__": ()}
    members["__new__"] = lambda cls, *args: object.__new__(cls) if make is None else make()
    members["__init__"] = lambda self, *args: None
    members["__setstate__"] = lambda self, state: None
    return type(qualname, (), members)


# What people keep beside the weights: arguments, settings, times, paths, NumPy's numbers.
STAND_INS = [
    *map(_stand_in, ("argparse.Namespace", "types.SimpleNamespace", "typing.Any", "uuid.UUID", "decimal.Decimal")),
    *(_stand_in(f"builtins.{name}") for name in ("dict", "list", "int", "float", "str", "bool", "frozenset", "range")),
    *(_stand_in(f"datetime.{name}") for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(
        _stand_in(f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    *(_stand_in(f"numpy.{name}") for name in ("dtype", "ndarray")),
    *(_stand_in(f"numpy.{core}.multiarray.{f}") for core in ("core", "_core") for f in ("scalar", "_reconstruct")),
    *(_stand_in(f"omegaconf.{name}") for name in ("base.ContainerMetadata", "base.Metadata", "nodes.AnyNode")),
    *(_stand_in(f"omegaconf.{name}") for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    _stand_in("collections.deque", list),
    _stand_in("collections.defaultdict", OrderedDict),
    *(_stand_in(name, OrderedDict) for name in ("easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode")),
    *(
        _stand_in(f"{module}.AttributeDict", OrderedDict)
        for module in (
            *("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing"),
            *("lightning_fabric.utilities.data", "lightning.fabric.utilities.data"),
        )
    ),
]


def _is_safetensors(content: bytes, suffix: str = "") -> bool:
    """Whether it begins as a safetensors file does, or has its suffix and does not begin as a file of torch.save."""
    if content.startswith(ZIP_START) or OLDER_FORMAT in content[:40]:
        return False
    begins = content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= SAFETENSORS_HEADER
    return begins or suffix == ".safetensors"


def _safetensors(content: bytes) -> tuple[State, About | None]:
    """The tensors of a safetensors file: a length of 8 bytes, a header in JSON, and the data without gap or overlap.

    And its about.json, where it is one of export.py's. Raises _Foreign for a type that torch has not, and anything for
    what is damaged.
    """
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], memoryview(content)[8 + length :]
    entries = json.loads(header.decode())
    about = from_metadata(entries.pop("__metadata__", None))
    state, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, stop), shape = entry["data_offsets"], entry["shape"]
        if any(type(number) is not int or number < 0 for number in (begin, stop, *shape)):
            raise ValueError("a size is no number")
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise _Foreign(f"a safetensors file with tensors of a type that is not read ({name[:80]!a})")
        dtype = SAFETENSORS_TYPES[entry["dtype"]]
        if begin != end or stop > len(data) or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError("a tensor's place does not fit")
        piece = bytearray(data[begin:stop])
        flat = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0, dtype=dtype)
        state[name], end = flat.reshape(shape), stop
    if end != len(data):
        raise ValueError("there is data that belongs to no tensor")
    return state, about


class _Found(NamedTuple):
    """A set of weights in a file. name: where it is ("model.ema"). inside: the weights by the network's own names.

    outside: what lies beside the networks in the same dict, by its own names.
    """

    name: str
    inside: dict[Any, Any]
    outside: dict[Any, Any]


def _taken(
    value: object, path: Path, kind: str | None, key: str | None, tells: bool = True, start: bool = False
) -> dict[str, Any]:
    """Of the sets of weights in what the file holds, the one to take; says which where there are several.

    The one that lacks the fewest weights of the kind asked for comes first, then the one with the fewest of another
    shape, then those of WRAPPERS' names, in that order. Raises UserError where there is none, or none comes first.
    """
    wanted = _wanted(kind)

    def place(found: _Found) -> tuple:
        lacking, misfits, surplus = min(_unlike(found.inside, skeleton) for skeleton in wanted)
        steps = [WRAPPERS.index(step) if step in WRAPPERS else len(WRAPPERS) for step in found.name.split(".") if step]
        return lacking, misfits, lacking > 0 and not found.name, 0 if lacking else surplus, steps

    sets = sorted(_sets(value, wanted), key=place)
    if not sets:
        raise UserError(f"{path} is not a state_dict (names to plain tensors)")
    names = [ascii(found.name)[1:-1] or "not in any dict" for found in sets]
    several = f"{path} holds several sets of weights ({', '.join(names[:6])}{', ...' * (len(names) > 6)})"
    if key is not None:
        exact = [found for found in sets if found.name == key]
        sets = exact or [found for found in sets if f".{key}." in f".{found.name}."]
        if not sets:
            raise UserError(
                f"--weights_key {key}: {path} holds no such set of weights; it holds {', '.join(names[:6])}"
            )
    together = sum(found.outside is sets[0].outside for found in sets)  # in one dict
    if len(sets) > 1 and place(sets[0]) == place(sets[1]):
        raise UserError(f"{several}: choose one with --weights_key NAME")
    if len(names) > 1 and tells:
        say(f"{several}: taking {ascii(sets[0].name)[1:-1] or names[0]}; --weights_key NAME takes another")
    if not kind:
        return {**sets[0].outside, **sets[0].inside}
    entries = _with_head(sets[0], wanted[0], path, tells)
    beside = [name for name in _beside(sets[0], wanted[0], together > 1 or start) if name in entries]
    if beside and tells:
        say(f"{path}: left out, beside its networks: {ascii(beside[0])[1:-1]}{', ...' * (len(beside) > 1)}")
    return {name: entry for name, entry in entries.items() if name not in beside}


def _beside(found: _Found, wanted: models.Skeleton, alone: bool) -> list[str]:
    """What lies beside the network and is none of its weights: all, where it is taken alone.

    Beside a student and a teacher, or a whole one of them, that is the training's own, as the layers that a loss
    learns. Beside another network it is a preprocessor's statistics.
    """
    names = [name for name in found.outside if not _is_bookkeeping(name)]
    whole = wanted.head.keys() <= found.inside.keys() and DISTILLED.search(found.name)
    return names if alone or whole else [name for name in names if PREPROCESSOR.search(name)]


def _wanted(kind: str | None) -> list[models.Skeleton]:
    """The skeletons of the network that is looked for: of that kind, of the rows' where none is asked for."""
    try:
        return [models.skeleton(name) for name in ([kind] if kind else models.NETWORKS)]
    except UserError:  # one that models does not know
        return _wanted(None)


def _unlike(entries: dict[Any, Any], skeleton: models.Skeleton) -> tuple[int, int, int]:
    """How many of the network's weights lack, how many have another shape, and how many others are there."""
    there = [name for name in skeleton.body if name in entries]
    lacking = sum(name not in entries and not _is_bookkeeping(name) for name in skeleton.body)
    misfits = sum(getattr(entries[name], "shape", None) != skeleton.body[name] for name in there)
    return lacking, misfits, len(entries) - len(there)


def _with_head(found: _Found, wanted: models.Skeleton, path: Path, tells: bool) -> dict[str, Any]:
    """The set's weights, the last layer's among them where it has another name, beside the network or in it."""
    entries, (body, head) = {**found.outside, **found.inside}, wanted
    modules = {name.rpartition(".")[0] for name in head}
    if len(modules) != 1 or head.keys() & entries.keys():
        return entries
    module, features = modules.pop(), {name.rpartition(".")[2]: shape[1:] for name, shape in head.items()}
    layers: dict[str, dict[str, Any]] = {}
    for name in entries.keys() - body.keys():
        if _is_weight(entries[name]):
            layers.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = entries[name].shape[1:]
    fitting = sorted(layer for layer, shapes in layers.items() if shapes == features)
    same_name = [layer for layer in fitting if layer.rpartition(".")[2] == module.rpartition(".")[2]]
    if len(fitting) != 1 and len(same_name) != 1:
        return entries
    layer = (same_name if len(same_name) == 1 else fitting)[0]
    if tells:
        say(f"{path}: its last layer is {layer!a}")
    names = {f"{layer}.{leaf}": f"{module}.{leaf}" for leaf in features}
    return {names.get(name, name): entry for name, entry in entries.items()}


def _sets(value: object, wanted: list[models.Skeleton], name: str = "", depth: int = 0) -> Iterator[_Found]:
    """The sets of weights in the value and in its dicts up to two levels down."""
    if not isinstance(value, dict):
        return
    # dict.items(value), not value.items(): a file can give an OrderedDict attributes, which would hide methods.
    items = dict(dict.items(value))
    if any(_is_weight(entry) for entry in items.values()):
        yield from _networks(items, wanted, name)
    for key, inner in items.items():
        if depth < 2 and isinstance(key, str):
            yield from _sets(inner, wanted, f"{name}.{key}" if name else key, depth + 1)


def _is_weight(value: object) -> bool:
    """Whether it is a tensor and not just a number, nor the state of a generator of random numbers."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.dtype != torch.uint8


def _networks(entries: dict[Any, Any], wanted: list[models.Skeleton], name: str) -> Iterator[_Found]:
    """A set of weights for each prefix of names under which a wanted network lies, or one beside it."""
    if not all(isinstance(key, str) for key in entries):
        yield _Found(name, entries, {})
        return
    prefixes = _prefixes(entries, wanted)
    owners = {key: max(filter(key.startswith, prefixes), key=len, default=None) for key in entries}
    outside = {key: value for key, value in entries.items() if owners[key] is None}
    for prefix in prefixes:
        inside = {key.removeprefix(prefix): value for key, value in entries.items() if owners[key] == prefix}
        yield _Found(f"{name}.{prefix}".strip("."), inside, outside)
    if not prefixes:
        yield _Found(name, _modern(_without_prefix(entries)), {})


def _prefixes(entries: dict[str, Any], wanted: list[models.Skeleton]) -> list[str]:
    """The prefixes under which a quarter of a wanted network's names are, and those beside them of WRAPPERS' names."""
    prefixes = set()
    for skeleton in wanted:
        counts = Counter(
            key[:start]
            for key in entries
            for start in [0, *(match.end() for match in islice(re.finditer(r"\.", key), DEPTH))]
            if key[start:] in skeleton.body
        )
        prefixes |= {prefix for prefix, n in counts.items() if 4 * n > len(skeleton.body)}
    around = {re.sub(r"[^.]+\.$", "", prefix) for prefix in prefixes}
    beside = {f"{start}{step}." for start in around for step in WRAPPERS}
    return sorted(prefixes | {prefix for prefix in beside if any(key.startswith(prefix) for key in entries)})


def _without_prefix(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries without the prefix that all names have, bookkeeping aside: "module.", "model.net.", any."""
    while True:
        names = [name for name in entries if not _is_bookkeeping(name)]
        heads = {name[: name.find(".") + 1] for name in names}
        if len(heads) != 1 or heads == {""}:
            return entries
        head = heads.pop()
        outside = {name: value for name, value in entries.items() if not name.startswith(head)}
        inside = {name.removeprefix(head): value for name, value in entries.items() if name.startswith(head)}
        entries = {**outside, **inside}


def _modern(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries with the older layout's names replaced by torchvision's."""

    def rename(key: str) -> str:
        prefix = key[:7]
        return LEGACY_PREFIXES[prefix] + key[7:] if prefix in LEGACY_PREFIXES else key

    renamed = {rename(key): value for key, value in entries.items()}
    return renamed if len(renamed) == len(entries) else entries


def _is_bookkeeping(name: str) -> bool:
    """Whether an entry of that name is none of a network's weights."""
    module, _, rest = WRAPPED.sub("", name).partition(".")
    is_objective = module in OBJECTIVES or (rest and OF_A_PHASE.fullmatch(module))
    return name in NOTES or bool(is_objective) or name.rpartition(".")[2] in COUNTERS


def _plain(entries: object, path: Path) -> State:
    """The entries as a state_dict of plain tensors. Raises UserError for one that is none."""
    state = {}
    for key, value in dict.items(entries) if isinstance(entries, dict) else ():
        if not isinstance(key, str) or not key.isprintable():
            raise UserError(f"{path} is not a state_dict: a name in it is not text")
        if _is_bookkeeping(key) and not isinstance(value, torch.Tensor):
            continue
        if flaw := _flaw(value):
            raise UserError(f"{path} is not a state_dict of plain tensors: {key} is {flaw}")
        state[key] = torch.Tensor.detach(value)  # without attributes that a file can give, which would hide methods
    if not state:
        raise UserError(f"{path} is not a state_dict (names to plain tensors)")
    return state


def _flaw(value: object) -> str | None:
    """What keeps it from being a plain tensor, dense and with its data."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"of the type {type(value).__name__}"
    if value.layout != torch.strided:
        return "sparse"
    if value.is_nested:
        return "nested"
    return None if value.device.type == "cpu" else "without its data"


class Contents(NamedTuple):
    """What a state_dict is of.

    title: one of models.TITLES' values, or "network of another kind". classes: how many it tells apart, None where
    that can't be seen. stem: as `stem` says.
    """

    title: str
    classes: int | None
    stem: str | None


def describe(state: State) -> Contents:
    """What the state_dict is of, seen from its names and shapes."""
    classes = state["fc.bias"].shape.numel() if "fc.bias" in state else None
    return Contents(_architecture(state), classes, stem(state))


def classes_in(state: State, arch: str, stem: str) -> int | None:
    """How many classes the network of that name, whose state_dict it is, tells apart; None where that can't be seen."""
    for name in models.classifier_weights(arch, stem):
        if name in state and state[name].ndim:
            return len(state[name])
    return None


def stem(state: State) -> str | None:
    """ "small" for a conv1 of 3x3, "standard" for ImageNet's of 7x7, None for any other."""
    kernel = tuple(state["conv1.weight"].shape[2:]) if "conv1.weight" in state else None
    return {(3, 3): "small", (7, 7): "standard"}.get(kernel)


def _architecture(state: dict[str, Any]) -> str:
    """What the state_dict is of: one of models.TITLES, or OTHER."""
    if not {"conv1.weight", "fc.weight", "fc.bias", "layer4.1.conv1.weight"} <= state.keys():
        return OTHER
    if "transfer.0.weight" in state:
        return OTHER
    blocks = [sum(f"layer{i}.{j}.conv1.weight" in state for j in range(40)) for i in range(1, 5)]
    if "layer1.0.conv3.weight" in state:
        return TITLES["teacher"] if blocks == [3, 4, 6, 3] else OTHER
    if blocks != [2, 2, 2, 2]:
        return OTHER
    return TITLES["feature_student" if "proj.weight" in state else "student"]


def load(network: torch.nn.Module, kind: str, path: Path, hint: str) -> torch.nn.Module:
    """Load the file into the network, as `fill` does. Raises UserError as `read` and `fill` do."""
    return fill(network, kind, read(path, hint, kind)[0], path)


def fill(network: torch.nn.Module, kind: str, state: State, path: Path) -> torch.nn.Module:
    """Load what `read` gave from `path` into the network of that kind, a name that models.build knows, strictly.

    Both layouts of a feature student load. Raises UserError as `fit_into` does, and for a checkpoint of another
    architecture or another number of classes; then the network is as it was.
    """
    holds, wanted = describe(state), describe(network.state_dict())
    if holds.title != wanted.title and (holds.title, wanted.title) != (TITLES["feature_student"], TITLES["student"]):
        needed = kind if wanted.title == OTHER else wanted.title
        told = "; name it with --teacher_arch or --student_arch" if holds.title == OTHER else ""
        raise UserError(f"{path} holds a {holds.title}, not the {needed} needed here{told}")
    if None not in (holds.classes, wanted.classes) and holds.classes != wanted.classes:
        raise UserError(f"{path} tells {holds.classes} classes apart, the data set has {wanted.classes}")
    fit_into(network, state, path, models.surplus(kind))
    return network


def fit_into(network: torch.nn.Module, state: State, path: Path, surplus: tuple[str, ...] = ()) -> None:
    """Load what `read` gave from `path`, strictly; known bookkeeping may lack or be there besides.

    surplus: how names begin that may be there besides, of parts that are in training alone.

    Raises UserError for names, shapes, types or values that don't do; the network is then as it was.
    """
    expected = network.state_dict()
    if not expected.keys() <= state.keys():
        state = _named_as(expected, state)
    missing = sorted(key for key in expected.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    others = sorted(key for key in state.keys() - expected.keys() if not _is_bookkeeping(key))
    others = [key for key in others if not key.startswith(surplus)]
    if missing or others:
        what = f"lacks {missing[0]}" if missing else f"has {others[0]} besides"
        raise UserError(f"{path} does not fit the network: it {what}")
    weights = {}
    for key, value in expected.items():
        given = state[key] if key in state else torch.zeros_like(value)
        if given.shape != value.shape:
            if other := _other_images(key, given, expected):
                raise UserError(f"{path} {other}")
            shapes = f"{tuple(given.shape)}, not {tuple(value.shape)}"
            raise UserError(f"{path} does not fit the network: {key} has the shape {shapes}")
        if given.dtype != value.dtype and not {given.dtype, value.dtype} <= FLOATS:
            raise UserError(f"{path} does not fit the network: {key} is of {given.dtype}, not {value.dtype}")
        weights[key] = given.to(value.dtype)
        if not weights[key].isfinite().all():
            what = "NaN" if weights[key].isnan().any() else "inf"
            raise UserError(f"{path} holds {what} in {key}: its training diverged; use another")
    network.load_state_dict(weights)


def _other_images(key: str, given: torch.Tensor, expected: State) -> str | None:
    """What images the network in the file is for, where the weights of that name show that and it takes others here."""
    value = expected[key]
    if given.ndim == value.ndim == 4 and given.shape[1] in (1, 2, 4) and value.shape[1] == 3:
        return f"is for images of {given.shape[1]} channels ({key}), images here have 3; train it on RGB images"
    if _is_of_positions(key, given, value):
        there, here = (f"{side}x{side}" for side in (_side(given, expected), _side(value, expected)))
        return f"is for images of {there} pixels, the network here for {here}; train it at {here}"
    return None


def _is_of_positions(key: str, given: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are a vision transformer's embeddings of the places of an image's patches."""
    return "pos_embed" in key and given.ndim == value.ndim == 3 and given.shape[2] == value.shape[2]


def _side(positions: torch.Tensor, expected: State) -> int:
    """The side of the images in pixels; besides the patches a few tokens have a position."""
    patch = next((value.shape[2] for value in expected.values() if value.ndim == 4 and value.shape[1] == 3), 1)
    return math.isqrt(positions.shape[1]) * patch


def _named_as(expected: State, state: State) -> State:
    """The state_dict with the names that the network has, where `read` took the prefix from them."""
    sets = list(_networks({key: key for key in expected}, _wanted(None), ""))
    names = {**sets[0].outside, **sets[0].inside} if len(sets) == 1 else {}
    return {names.get(key, key): value for key, value in state.items()}


def start(
    network: torch.nn.Module, source: str, arch: str = "teacher", stem: str = "small", key: str | None = None
) -> str | None:
    """Give the network the weights that it starts from: all but its classifier, and its stem if the file has another.

    source: "imagenet", for torchvision's weights; a file with such a network's weights; "none" leaves the random ones.
    key: as `read` has it. What a student was distilled through is neither asked for nor taken.
    Return the SHA-256 of the file's bytes, None for "none". Raises UserError where the weights can't be had or are of
    another network.
    """
    if source == "none":
        return None
    path = _imagenet_file(arch) if source == "imagenet" else Path(os.path.expanduser(source))
    plain = models.without_projector(arch.partition("+")[0])
    called = TITLES.get(plain, plain)
    state, about, digest = read_hashed(
        path, f"give --weights a state_dict of torchvision's {called}, or none", plain, key, start=True
    )
    if source == "imagenet" and not digest.startswith(path.stem.rpartition("-")[2]):
        raise UserError(f"{path} has changed since it was checked; start again")
    if about and models.without_projector(about["network"].partition("+")[0]) != plain:
        raise UserError(f"--weights {path} holds a {about['network']}, not a {called}")
    if about and library_models.transforms(plain) and about.get("stem", stem) != stem:
        raise UserError(f"--weights {path} was trained with --stem {about['stem']}; give that")
    own = tuple(f"{name.rpartition('.')[0]}." for name in models.own_weights(arch, stem))
    fresh, stems = network.state_dict(), models.stem_weights(plain)
    taken = {f"{name.rpartition('.')[0]}." for name in stems}
    own = tuple(start for start in own if start not in taken or _shapes(state, start) != _shapes(fresh, start))
    own += tuple(name for name in stems if _is_of_another_stem(network, state, name))
    beside = [key for key in state.keys() - fresh.keys() if key.startswith(models.DISTILLED_THROUGH)]
    state = {key: value for key, value in state.items() if not key.startswith(own) and key not in beside}
    state |= {key: value for key, value in fresh.items() if key.startswith(own)}
    state = _at_the_size(network, state, path)
    title = describe(state).title
    if title != TITLES.get(models.canonical(arch), OTHER):
        raise UserError(f"--weights {path} holds a {title}, not a {called}")
    fit_into(network, state, path, models.surplus(arch))
    return digest


def _at_the_size(network: torch.nn.Module, state: State, path: Path) -> State:
    """The weights of torchvision's vision transformer for images of the network's size, its positions interpolated."""
    expected, key = network.state_dict(), "encoder.pos_embedding"
    if key not in state.keys() & expected.keys() or state[key].shape == expected[key].shape:
        return state
    if not _is_of_positions(key, state[key], expected[key]):
        return state
    there, here = _side(state[key], expected), _side(expected[key], expected)
    say(f"{path} is for images of {there}x{there} pixels: its positions are interpolated for {here}x{here}")
    patch = expected["conv_proj.weight"].shape[2]
    return dict(interpolate_embeddings(here, patch, OrderedDict(state)))


def _shapes(state: State, start: str) -> dict[str, torch.Size]:
    """The shapes of the weights whose names begin so."""
    return {name: value.shape for name, value in state.items() if name.startswith(start)}


def _is_of_another_stem(network: torch.nn.Module, state: State, name: str) -> bool:
    """Whether the file's weights of that name are of a convolution of another size over the same channels."""
    given, value = state.get(name), network.state_dict()[name]
    return given is not None and given.shape[:2] == value.shape[:2] and given.shape != value.shape


def imagenet_url(arch: str) -> str | None:
    """Where torchvision's newest ImageNet weights of the network are, None where it has none."""
    name = models.library_name(arch)
    return get_model_weights(name).DEFAULT.url if name else None


def _imagenet_file(arch: str) -> Path:
    """torchvision's ImageNet weights on the disk, downloaded where they are not yet, or not as their name says.

    A file's name ends in the start of its SHA-256. What is there is replaced only by what is whole.
    """
    url = imagenet_url(arch)
    if url is None:
        raise UserError(f"--weights imagenet: torchvision has none for {arch}; give --weights FILE, or --weights none")
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    prefix = path.stem.rpartition("-")[2]
    delete = ""
    try:
        if path.exists():
            if sha256(path).startswith(prefix):
                return path
            say(f"{path} is cut short or another file (its SHA-256 does not begin with {prefix}): downloading it anew")
            delete = f"; {path} is damaged: delete it"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, or cut off; a wrong hash
        raise UserError(
            f"cannot download the ImageNet weights ({error}){delete}; put {name} (from {url}) into {path.parent}, "
            "or give --weights FILE, or --weights none"
        ) from None
    return path
