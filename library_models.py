"""Networks of torchvision and timm (in the making)."""

import difflib
from collections.abc import Iterable

import torchvision
from torch import nn

from util.runtime import UserError


def names() -> list[str]:
    """torchvision's classification networks."""
    return torchvision.models.list_models(module=torchvision.models)


def has_small_stem(name: str) -> bool:
    """Whether it has a stem for small images."""
    return name.startswith(("resnet", "resnext", "wide_resnet"))


def unknown(name: str, known: Iterable[str]) -> UserError:
    """What to raise for a name that no network has."""
    near = difflib.get_close_matches(name, list(known), 4) or list(known)[:8]
    return UserError(f"there is no network {name}; near are {', '.join(near)}")


def build(name: str, num_classes: int, stem: str) -> nn.Module:
    """A fresh network."""
    raise UserError(f"{name} is not built yet")


def surplus(name: str) -> tuple[str, ...]:
    """Prefixes of auxiliary parts."""
    return ()
