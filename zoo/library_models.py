"""Every classification network of torchvision by its name, and of timm as timm:NAME, as a network of this project.

Parameters are named as the library names them. A torchvision network is cut in two by its graph: `body`, from the
images to the maps, and `head`, from the last map to the logits.
"""

import contextlib
import copy
import difflib
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import NamedTuple

import torch
import torchvision
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from outputs import STAGES, Outputs
from util.runtime import UserError

TIMM = "timm:"
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def names() -> list[str]:
    """torchvision's classification networks."""
    return torchvision.models.list_models(module=torchvision.models)


def unknown(name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of `known`, which lists those like it."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    like = f"did you mean {' or '.join(near)}?" if near else "give one of torchvision's, as resnet18, or timm:NAME"
    return UserError(f"there is no network {name}; {like}")


def surplus(name: str) -> tuple[str, ...]:
    """What the keys begin with that checkpoints of the network have, and it has not: its auxiliary classifiers'."""
    return AUXILIARY.get(name, ())


def transforms(name: str) -> bool:
    """Whether torchvision builds it with transform_input for its ImageNet weights: images normalised by ImageNet's
    statistics are brought to a mean and a standard deviation of 0.5. No state_dict tells it.
    """
    return name in AUXILIARY


def has_small_stem(name: str) -> bool:
    """Whether the network can be built with a stem for small images. Raises UserError where there is none such."""
    if name.startswith(TIMM):
        with torch.device("meta"):
            return _timm_small_stem(_timm_model(name, num_classes=1)) is not None
    return _family(name) in SMALL_STEMS


BN_MOMENTUM = 0.1  # PyTorch's default


def build(name: str, num_classes: int, stem: str) -> "Library":
    """A fresh network, with random weights from torch's global generator; images (B, 3, H, W) to outputs.Outputs.

    stem: "standard", the library's own, "small", for images of 32 pixels or so: they are halved less; or
    "transform_input", see `transforms`.
    Raises UserError for a name that isn't known, a library that isn't installed, a stem that can't be changed.
    """
    if stem == "small" and not has_small_stem(name):
        raise UserError(f"{name} has no stem for small images; use --stem standard")
    if stem == "transform_input" and not transforms(name):
        raise UserError(f"--stem transform_input is for {' and '.join(AUXILIARY)}, not for {name}; use another")
    make = _timm_network if name.startswith(TIMM) else _torchvision_network
    network = make(name, num_classes, stem)
    for module in network.modules():
        # Some have 0.01 or less, for ImageNet's hundreds of thousands of steps: after the hundreds of a small data set
        # the running statistics would still be mostly those of the start, and a test at chance.
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum, BN_MOMENTUM)
    _start_small(network)
    return network


LARGE_START = 1.5  # of a last layer: its weights' standard deviation beside that of a fresh nn.Linear


def _start_small(network: "Library") -> None:
    """Start the last layer as nn.Linear starts where its family starts it larger.

    EfficientNet, MNASNet and timm's MobileNetV3 scale it by the number of classes, Inception by a constant. That suits
    the 1000 classes of ImageNet. For 10 classes the first cross-entropy would be several times ln(10).
    """
    sizes = [(m, getattr(m, "out_features", getattr(m, "out_channels", None))) for m in network.modules()]
    last = [module for module, size in sizes if size == network.num_classes and hasattr(module, "reset_parameters")][
        -1:
    ]
    for layer in last:
        fresh = (3 * layer.weight[0].numel()) ** -0.5
        if not layer.weight.is_meta and layer.weight.std(correction=0) > LARGE_START * fresh:
            layer.reset_parameters()


def layers(name: str, num_classes: int, stem: str) -> nn.Module:
    """The library's own network with that stem: the layers of `build`, which takes longer."""
    if not name.startswith(TIMM):
        return _torchvision_model(name, num_classes, stem)
    model = _timm_model(name, num_classes)
    if stem == "small":
        _timm_small_stem(model)(model)
    return model


def _family(name: str) -> str:
    """The module of torchvision.models that defines the network, "resnet" for "wide_resnet50_2"."""
    if name not in names():
        raise unknown(name, names())
    return torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


# Stems for small images


def _small_resnet(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()


def _small_densenet(model: nn.Module) -> None:
    features = model.features
    features.conv0 = nn.Conv2d(3, features.conv0.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    features.pool0 = nn.Identity()


def _small_shufflenet(model: nn.Module) -> None:
    model.conv1[0].stride = (1, 1)
    model.maxpool = nn.Identity()


def _small_at(path: str) -> Callable[[nn.Module], None]:
    """The stem whose first convolution, of that name, has stride 1."""

    def change(model: nn.Module) -> None:
        model.get_submodule(path).stride = (1, 1)

    return change


SMALL_STEMS: dict[str, Callable[[nn.Module], None]] = {  # by the module of torchvision.models
    "resnet": _small_resnet,
    "densenet": _small_densenet,
    "shufflenetv2": _small_shufflenet,
    "mobilenetv2": _small_at("features.0.0"),
    "mobilenetv3": _small_at("features.0.0"),
    "efficientnet": _small_at("features.0.0"),
    "regnet": _small_at("stem.0"),
    "mnasnet": _small_at("layers.0"),
}


# What all of them have


class Library(nn.Module):
    """What torchvision's and timm's networks have in common.

    `network_name` is the name that it is built by, `num_classes` the number of logits.
    """

    network_name: str
    num_classes: int

    def classify(self, last_map: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of a last feature map; of what the final layers are given, where there is no such map.

        In the weights' own precision, float32, whatever the autocast: logits rounded to bfloat16 tie, and a tie is
        settled by the class's number.
        """
        with _without_autocast(last_map.device.type):
            return self._head(last_map.to(next(self.parameters()).dtype))

    def _head(self, last_map: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def check(self, image_size: int) -> None:
        """Raise UserError where the network can't take images of that side. Computes nothing but shapes."""
        try:
            _on_meta(self, image_size)
        except (RuntimeError, AssertionError, ValueError) as error:  # a layer's, or the network's own check
            reason = str(error).strip().partition("\n")[0].partition(" but got Proxy")[0]  # a trace knows no value
            raise UserError(f"{self.network_name} can't take images of {image_size} pixels: {reason}") from error

    def folded(self) -> nn.Module:
        """A copy for inference alone: in eval mode, frozen, batch norm folded where it's known to follow a convolution.

        Else the copy has the same layers.
        """
        return copy.deepcopy(self).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _without_autocast(device_type: str) -> AbstractContextManager:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # the device of shapes alone, meta


@torch.no_grad()
def _on_meta(network: nn.Module, side: int) -> object:
    """What the network gives for two images of that side, as shapes alone: nothing is computed."""
    weights = itertools.chain(network.named_parameters(), network.named_buffers())
    weights = {name: torch.empty_like(value, device="meta") for name, value in weights}
    return torch.func.functional_call(network, weights, (torch.empty(2, 3, side, side, device="meta"),))


# torchvision


class Trace(NamedTuple):
    """A torchvision network's computation, cut in two, for eval mode (False) and training mode (True) each.

    body: a function of (network, images) to the maps at the ends of the stages and, last, what the head is given.
    head: a function of (network, that) to the logits, in a tuple. orders: the dimensions of the stages' maps as they
    are permuted to (B, C, H, W). folds: the names of convolutions and of the batch norms that alone follow them.
    constants: tensors that are computed from nothing but the network's settings, under the names they are used by.
    """

    body: Mapping[bool, Callable]
    head: Mapping[bool, Callable]
    orders: tuple[tuple[int, int, int, int], ...]
    folds: tuple[tuple[str, str], ...]
    constants: Mapping[str, torch.Tensor]


class TracedNetwork(Library):
    """A torchvision network's layers, under their own names, with its computation as traced."""

    def __init__(self, name: str, model: nn.Module, num_classes: int, trace: Trace):
        super().__init__()
        self.network_name, self.num_classes, self._trace = name, num_classes, trace
        self.transform_input = getattr(model, "transform_input", False)
        self._version = model._version  # is saved with the weights, and MNASNet's asks for it
        # Not as a module within this one: its name would be in the names of all parameters.
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        for constant, value in trace.constants.items():
            self.register_buffer(constant, value, persistent=False)

    def extra_repr(self) -> str:
        return "transform_input=True" if self.transform_input else ""

    def forward(self, images: torch.Tensor) -> Outputs:
        *ends, last = self._trace.body[self.training](self, images)
        maps = {name: end.permute(order) for name, end, order in zip(STAGES, ends, self._trace.orders, strict=False)}
        return Outputs(self.classify(last), last if maps else None, maps)

    def _head(self, last_map: torch.Tensor) -> torch.Tensor:
        return self._trace.head[self.training](self, last_map)[0]

    def folded(self) -> nn.Module:
        network = super().folded()
        for conv, norm in self._trace.folds:
            fused = fuse_conv_bn_eval(network.get_submodule(conv), network.get_submodule(norm))
            network.set_submodule(conv, fused.requires_grad_(False))
            network.set_submodule(norm, nn.Identity())
        return network.to(memory_format=torch.channels_last)


def _torchvision_model(name: str, num_classes: int, stem: str) -> nn.Module:
    family = _family(name)
    options = {"aux_logits": False, "init_weights": True, "transform_input": stem == "transform_input"}
    options = options if name in AUXILIARY else {}
    device = torch.get_default_device()
    # RegNet finds its widths by computing with tensors, which those of shapes alone, on meta, don't allow.
    with torch.device("cpu" if family == "regnet" else device):
        model = torchvision.models.get_model(name, num_classes=num_classes, **options).to(device)
    if stem == "small":
        SMALL_STEMS[family](model)
    return model


NCHW, NHWC = (0, 1, 2, 3), (0, 3, 1, 2)  # a map's dimensions, as they are permuted to (B, C, H, W)
PROBE = 224  # a side of images that every network takes, and at which no stage's map is a single pixel
HEADS = ("avgpool", "classifier")  # layers whose values have a map's shape in some networks, and are none

_traces: dict[tuple[str, str, str], Trace] = {}  # by name, stem and the device that a trace's constants are on


def _torchvision_network(name: str, num_classes: int, stem: str) -> TracedNetwork:
    model = layers(name, num_classes, stem)
    key = name, stem, torch.get_default_device().type
    if key not in _traces:
        _traces[key] = _trace(model)
    return TracedNetwork(name, model, num_classes, _traces[key])


def _trace(model: nn.Module) -> Trace:
    train_names, eval_names = get_graph_node_names(model, suppress_diff_warning=True)
    extractor = create_feature_extractor(
        model,
        train_return_nodes={name: name for name in train_names},
        eval_return_nodes={name: name for name in eval_names},
        suppress_diff_warning=True,
    ).eval()
    shapes = {name: getattr(value, "shape", ()) for name, value in _on_meta(extractor, PROBE).items()}
    stages = _stages(shapes)
    body, head, constants = {}, {}, {}
    for training, graph in ((False, extractor.eval_graph), (True, extractor.train_graph)):
        nodes = next(node.args[0] for node in graph.nodes if node.op == "output")
        images, *_, logits = nodes.values()
        ends = [nodes[name] for name in stages]
        last = ends[-1] if ends else _final_input(model, graph)
        checks = [node for node in graph.nodes if node.target is torch._assert]
        body[training] = _part(model, graph, images, [*ends, last], checks)
        head[training] = _part(model, graph, last, [logits])
        names = [node.target for node in graph.nodes if node.op == "get_attr" and node.target in vars(model)]
        constants.update({name: getattr(model, name) for name in names})
    folds = tuple(_folds(model, body[False].graph))
    return Trace(_functions(body), _functions(head), tuple(stages.values()), folds, constants)


def _functions(parts: Mapping[bool, fx.GraphModule]) -> dict[bool, Callable]:
    """What the parts compute, as functions of (network, value) that find the layers in the network by their names."""
    return {training: type(part).forward for training, part in parts.items()}


def _stages(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int, int]]:
    """The names of the values at the ends of the last four stages, and the order of each one's dimensions.

    shapes: of all values that are computed for two images, in the order of computation, under their names, each with
    those of the containers it is computed in. Empty for a network whose maps have one resolution: that's a
    transformer, whose patches' embedding is no feature map.
    """
    orders = {name: _order(shape) for name, shape in shapes.items() if name.partition(".")[0] not in HEADS}
    _, *names = (name for name, order in orders.items() if order)  # the first are the images
    sides = {name: shapes[name][orders[name][2]] for name in names}
    resolutions = sorted(set(sides.values()), reverse=True)[-len(STAGES) :]
    return {end: orders[end] for end in (_end(sides, side) for side in resolutions if len(resolutions) > 1)}


def _order(shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The order of the dimensions of a square map of more than one pixel, for two images; None for other shapes."""
    if len(shape) == 4 and shape[0] == 2:
        return next((order for order in (NCHW, NHWC) if shape[order[2]] == shape[order[3]] > 1), None)
    return None


def _end(sides: Mapping[str, int], resolution: int) -> str:
    """The name of the last map of that resolution; sides: of all maps, in the order of computation.

    But what the first block of a lower resolution computes at this one yet, as the wide map before a strided
    convolution, isn't the end of this stage. So the end is in as few containers as can be together with the first map
    of a lower resolution.
    """
    names = [name for name, side in sides.items() if side == resolution]
    following = next((name for name, side in sides.items() if side < resolution), "")
    return min(reversed(names), key=lambda name: len(os.path.commonprefix([name.split("."), following.split(".")])))


def _final_input(model: nn.Module, graph: fx.Graph) -> fx.Node:
    """What the final linear layer is given."""
    layers = [node for node in graph.nodes if node.op == "call_module"]
    return next(n.args[0] for n in reversed(layers) if isinstance(model.get_submodule(n.target), nn.Linear))


def _part(
    model: nn.Module, graph: fx.Graph, start: fx.Node, ends: list[fx.Node], checks: Iterable[fx.Node] = ()
) -> fx.GraphModule:
    """The part of the network from the value at start to a tuple of the values at the ends, with these checks."""
    needed = {*ends, *checks}
    for node in reversed(graph.nodes):
        if node in needed and node is not start:
            needed.update(node.all_input_nodes)
    part, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node is start:
            copies[node] = part.placeholder("given")
        elif node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[end] for end in ends))
    return fx.GraphModule(model, part)


def _folds(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """The names of the convolutions whose output goes to a batch norm and nowhere else, each with the batch norm's."""
    layers = {node: model.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    for node, layer in layers.items():
        before = node.args[0]
        if _foldable(layers.get(before), layer) and len(before.users) == 1:
            yield before.target, node.target
        if isinstance(layer, nn.Sequential):  # one of torchvision.ops, which isn't traced through
            for (conv_name, conv), (norm_name, norm) in itertools.pairwise(layer.named_children()):
                if _foldable(conv, norm):
                    yield f"{node.target}.{conv_name}", f"{node.target}.{norm_name}"


def _foldable(conv: nn.Module | None, norm: nn.Module) -> bool:
    return isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)


# timm


class TimmNetwork(Library):
    """What goes before a timm network's own class: forward() in two parts, by timm's methods for them."""

    output_fmt = "NCHW"  # of forward_features, where timm's class doesn't say
    _ends: list[int]  # which of its intermediate features are at the ends of the last four stages

    def forward(self, images: torch.Tensor) -> Outputs:
        if self._ends:
            last, ends = self.forward_intermediates(images, indices=self._ends, output_fmt="NCHW")
        else:
            last, ends = self.forward_features(images), []
        is_map = last.ndim == 4
        if is_map and self.output_fmt == "NHWC":
            last = last.permute(NHWC)
        return Outputs(self.classify(last), last if is_map else None, dict(zip(STAGES, ends, strict=False)))

    def _head(self, last_map: torch.Tensor) -> torch.Tensor:
        if last_map.ndim == 4 and self.output_fmt == "NHWC":
            last_map = last_map.permute(0, 2, 3, 1)
        return self.forward_head(last_map)


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise UserError("a network of timm's, timm:NAME, needs timm; pip install timm") from None


def _timm_model(name: str, num_classes: int) -> nn.Module:
    timm = _timm()
    plain = name.removeprefix(TIMM)
    if plain.partition(".")[0] not in timm.list_models():
        raise unknown(name, [TIMM + known for known in timm.list_models()])
    return timm.create_model(plain, num_classes=num_classes)


def _timm_network(name: str, num_classes: int, stem: str) -> nn.Module:
    model = layers(name, num_classes, stem)
    ends = _timm_ends(model)
    # The model itself, in a class of ours: a module that holds it would be in the names of all parameters.
    model.__class__ = type(f"Timm{type(model).__name__}", (TimmNetwork, type(model)), {})
    model.network_name, model.num_classes, model._ends = name, num_classes, ends
    return model


def _timm_ends(model: nn.Module) -> list[int]:
    """The intermediate features that are the last at one of the last four resolutions; none where all have one."""
    if not hasattr(model, "forward_intermediates"):
        return []
    last = {feature["reduction"]: i for i, feature in enumerate(model.feature_info)}
    return sorted(last.values())[-len(STAGES) :] if len(last) > 1 else []


def _timm_small_stem(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """What gives the network a stem for small images; None for a family where that takes more than one convolution."""
    family = type(model).__module__.rpartition(".")[2]
    if family == "resnet" and isinstance(model.conv1, nn.Conv2d):
        return _small_resnet
    return {
        "efficientnet": _small_at("conv_stem"),
        "mobilenetv3": _small_at("conv_stem"),
        "regnet": _small_at("stem.conv"),
    }.get(family)
