"""Other devices than a CPU, without having one.

Under PyTorch's FakeTensorMode tensors have a shape, a type and a device, and no values, so that the forward half of a
step runs "on" any device; the backward half does not: autograd wants the device's own streams. Where PyTorch is built
without a device, Python's indexing, ~ and copy_ want its driver, too: `Without` does these by their shapes alone.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import engine
import losses
import models
from data import Batches, Split
from engine import Position
from recipes import RECIPES
from util import runtime
from util.processes import Processes
from zoo import relations

DEVICES = [torch.device("cuda", 0), torch.device("mps", 0)]
CPU = torch.device("cpu")
B, CLASSES, SIZE, N = 6, 10, 32, 40
ROWS = [
    *RECIPES.values(),
    *(
        replace(
            RECIPES["distillation"],
            job=f"loss {name}",
            soft=name,
            settings={},
            network="feature_student" if loss.projects else "student",
            arch="student+teacher" if loss.reuses else None,
        )
        for name, loss in losses.LOSSES.items()
    ),
]
NETWORKS = [*models.NETWORKS, "student+teacher"]
PROBES = (runtime.widest, runtime.has_fused, runtime.takes_pinned_memory)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Strict(TorchDispatchMode):
    """A device that has no float64 if it is MPS, and that takes no tensor from the CPU but by a copy to it."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [value for value in tensors((args, kwargs)) if value.ndim > 0]  # a number may come from the CPU
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if "copy" not in name and len({value.device for value in given}) > 1:
            raise RuntimeError(f"{name} takes tensors of two devices")
        if any(value.device.type == "mps" and value.dtype == torch.float64 for value in tensors(result)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


class Without(TorchFunctionMode):
    """What can't be run on a fake tensor of a device that this PyTorch is built without, by shapes alone."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "__getitem__" and args[0].device.type == "mps":
            assert {value.device for value in tensors(args)} == {args[0].device}
            own, key = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, args)
            shape = own[key].shape
            return torch.empty(shape, dtype=args[0].dtype, device=args[0].device)
        if name in ("__setitem__", "copy_") and args[0].device.type == "mps":
            assert {value.device for value in tensors(args)} == {args[0].device}
            return args[0]
        if name == "__invert__" and args[0].device.type == "mps":
            return torch.logical_not(args[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def probed_anew():
    """What is asked of a fake device is not asked of a real one."""
    for probe in PROBES:
        probe.cache_clear()
    yield
    for probe in PROBES:
        probe.cache_clear()


@contextlib.contextmanager
def pretending(device):
    with FakeTensorMode(), Strict(device), Without():
        yield


@pytest.fixture
def forward_half(monkeypatch):
    """Without the backward half, which RKD has within its forward one."""
    monkeypatch.setattr(torch.autograd, "grad", lambda out, of: (torch.zeros_like(of),))
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda self, *needs: self)
    monkeypatch.setattr(torch, "enable_grad", contextlib.nullcontext)
    with torch.no_grad():
        yield


def placed(module, device):
    """The module with fake weights on the device; to be called in FakeTensorMode."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                    own[name] = nn.Parameter(fake, requires_grad=False) if own is part._parameters else fake
    return module


def outputs_of(network, device):
    placed(network, device)
    outputs = network(torch.zeros(B, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last))
    own = {"head": network.classify, "prototypes": models.prototypes(network)}
    return outputs._replace(**own, index=torch.arange(B, device=device))


@pytest.fixture(scope="module")
def shapes():
    return {name: models.shapes(models.build(name, CLASSES), SIZE, N) for name in NETWORKS}


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_term_of_every_row_is_on_the_device(monkeypatch, device, shapes, forward_half):
    monkeypatch.setattr(runtime, "takes_pinned_memory", lambda device: False)  # there is no fake of it
    with torch.device("meta"):
        networks = {name: models.build(name, CLASSES).eval() for name in NETWORKS}
        pairs = [(shapes[row.built], shapes["teacher"]) if row.distils else () for row in ROWS]
        objectives = [losses.Objective(row, *pair).eval() for row, pair in zip(ROWS, pairs, strict=True)]
    wrong = {}
    with pretending(device):
        given = {name: outputs_of(network, device) for name, network in networks.items()}
        labels, alpha = torch.zeros(B, dtype=torch.int64, device=device), torch.ones((), device=device)
        for row, objective in zip(ROWS, objectives, strict=True):
            placed(objective, device)
            try:
                terms = objective(given[row.built], given["teacher"] if row.distils else None, labels, alpha)
            except (RuntimeError, TypeError) as error:
                wrong[row.job] = error
                continue
            found = {name: (term.device, term.dtype, term.shape) for name, term in terms.items()}
            if found != dict.fromkeys(("loss", "ce", *losses.terms_of(row)), (device, torch.float32, ())):
                wrong[row.job] = found
    assert not wrong


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_made_on_the_device(monkeypatch, device, augment):
    monkeypatch.setattr(runtime, "takes_pinned_memory", lambda device: False)  # there is no fake of it
    with pretending(device):
        split = Split(torch.zeros(N, SIZE, SIZE, 3, dtype=torch.uint8), torch.zeros(N, dtype=torch.int64))
        batches = Batches(split, (0.5,) * 3, (0.5,) * 3, 32, device, augment=augment)
        given = list(batches.epoch(0))
    assert [len(batch.labels) for batch in given] == [32, N - 32]
    for batch in given:
        assert {value.device for value in (batch.index, batch.images, batch.labels)} == {device}
        assert batch.host_index.device == CPU
        assert batch.images.dtype == torch.float32 and batch.images.shape[1:] == (3, SIZE, SIZE)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_sums_of_a_device_without_float64_wait_on_it():
    device = torch.device("mps", 0)
    at = Position()
    with pretending(device):
        at.add({"loss": torch.ones((), device=device)}, 4, 0.5)
    assert at.totals == {} and [(images, share) for _, images, share in at.waiting] == [(4, 0.5)]


def test_sums_without_float64_are_as_exact(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    terms = [dict(zip(("loss", "ce"), torch.rand(2, generator=generator) * 1e4, strict=True)) for _ in range(3000)]

    def means(kind):
        monkeypatch.setattr(engine, "widest", lambda device: kind)
        at = Position()
        for step in terms:
            at.add(step, 256, 1 / len(terms))
        return at.means(256 * len(terms), Processes())

    assert means(torch.float32) == means(torch.float64)


@pytest.mark.parametrize("fused", [False, True])
def test_training_and_testing_where_the_device_lacks_much(digits, cpu, monkeypatch, fused):
    """The same figures without float64, and, but for rounding, without the fused step."""
    some = Split(digits.test.images[:48], digits.test.labels[:48])
    batches = Batches(some, digits.mean, digits.std, 32, CPU)
    asked, adam = [], torch.optim.Adam

    def figures():
        torch.manual_seed(0)
        network = models.build("student", CLASSES)
        fit = {"alpha": torch.ones(1, 2), "learning_rate": lambda epoch, iteration: 1e-3, "runtime": cpu}
        (trained,) = engine.fit(network, batches, losses.Objective(RECIPES["student"]), **fit)
        trained.pop("seconds")
        return trained, engine.evaluate(network, batches, cpu)

    expected = figures()
    monkeypatch.setattr(engine, "widest", lambda device: torch.float32)
    monkeypatch.setattr(engine, "has_fused", lambda kind, device: fused)
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: asked.append(options) or adam(*args, **options))
    trained, tested = figures()
    assert [options["fused"] for options in asked] == [fused]
    assert trained == pytest.approx(expected[0], rel=1e-4 if not fused else 1e-7)
    if fused:
        assert tested == expected[1]


# what a device can do


def test_probes():
    assert runtime.widest(CPU) == torch.float64 and runtime.has_fused(torch.optim.Adam, CPU)
    assert not runtime.takes_pinned_memory(CPU) and not runtime.takes_pinned_memory(torch.device("mps", 0))
    with pretending(torch.device("mps", 0)):
        assert runtime.widest(torch.device("mps", 0)) == torch.float32
    assert not runtime.has_fused(torch.optim.RMSprop, CPU)  # has no option fused


def test_tensors_are_sent_from_pinned_memory_where_the_device_takes_it(monkeypatch):
    pinned, tensor = [], torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    assert runtime.send(tensor, CPU) is tensor and not pinned
    monkeypatch.setattr(runtime, "takes_pinned_memory", lambda device: True)
    assert runtime.send(tensor, CPU) is tensor and len(pinned) == 1


def test_free_memory_of_other_devices(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10)
    for used, free in ((3, 7), (11, 0)):
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda used=used: used)
        assert runtime.free_memory(torch.device("mps", 0)) == free

    def untold(device):
        raise RuntimeError("The device doesn't support querying the available free memory")

    monkeypatch.setattr(torch.xpu, "mem_get_info", untold)
    assert runtime.free_memory(torch.device("xpu", 0)) == 0
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (5, 9))
    assert runtime.free_memory(torch.device("xpu", 0)) == 5


def test_batches_for_inference():
    sizes = {kind: runtime.inference_batch(torch.device(kind)) for kind in ("cpu", "mps", "cuda", "xpu")}
    assert sizes == {"cpu": 250, "mps": 250, "cuda": 1000, "xpu": 1000}


@pytest.mark.parametrize("kind, near", [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_rkd_sets_no_rows_apart_that_differ_by_rounding(monkeypatch, kind, near):
    monkeypatch.setattr(relations, "widest", lambda device: kind)
    x = torch.rand(40, 2048, generator=torch.Generator().manual_seed(0))
    x[1::2] = x[::2] * (1 + 1e-7)
    d = relations._distances(x).double()
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    apart = torch.arange(40)[:, None] // 2 != torch.arange(40) // 2
    assert not d[~apart].any()
    torch.testing.assert_close(d[apart], exact[apart] / exact[apart].mean(), rtol=near, atol=near)
