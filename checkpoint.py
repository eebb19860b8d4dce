"""Weights to and from disk: plain state_dicts, written atomically, read as data and never as code."""

import pickle
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import ResNet50_Weights

from files import replacing
from models import TITLES, CifarResNet
from runtime import UserError

# Another layout of a feature student, that of a network cut into a torch.nn.Sequential.
LEGACY_PREFIXES = {
    "base.0.": "conv1.",
    "base.1.": "bn1.",
    "base.4.": "layer1.",
    "base.5.": "layer2.",
    "base.6.": "layer3.",
    "base.7.": "layer4.",
}

# What unpickling, unzipping and rebuilding tensors raise on a damaged file.
DAMAGED = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, MemoryError)

State = dict[str, torch.Tensor]


def save(network: torch.nn.Module, path: Path) -> None:
    """Write the network's state_dict to `path`, atomically, as plain contiguous tensors on the CPU."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with replacing(path) as file:
        torch.save(state, file)


def read(path: Path, hint: str) -> State:
    """The state_dict in the file, whatever the network; `hint` says what to do where the file is missing.

    Raises UserError for a file that is missing, damaged, no state_dict, or a pickle that would run code (not run).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {hint}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():  # it names something to import: a class, or a function to call
            raise UserError(f"{path} holds more than tensors and could run code: refused. Save a state_dict") from None
        raise UserError(f"{path} is damaged, or not a checkpoint of PyTorch; {hint}") from None
    except DAMAGED:
        raise UserError(f"{path} is damaged (cut short?), or not a checkpoint of PyTorch; {hint}") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state_dict (names to tensors)")
    return state


def load(network: CifarResNet, kind: str, path: Path, hint: str) -> CifarResNet:
    """Load the file into the network of that kind ("teacher", "student", "feature_student"), strictly.

    Both layouts of a feature student load. Raises UserError as `read` does, and for a checkpoint of another
    architecture or another number of classes; then the network is as it was.
    """
    state = _modern(read(path, hint))
    holds = _architecture(state)
    if holds != TITLES[kind]:
        raise UserError(f"{path} holds a {holds}, not the {TITLES[kind]} needed here")
    classes, wanted = len(state["fc.bias"]), network.fc.out_features
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
    expected = network.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has {surplus[0]} besides"
        raise UserError(f"{path} does not fit the network: it {what}")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            shapes = f"{tuple(state[key].shape)}, not {tuple(value.shape)}"
            raise UserError(f"{path} does not fit the network: {key} has the shape {shapes}")
    network.load_state_dict(state)
