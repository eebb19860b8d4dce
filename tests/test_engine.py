"""The loop, the evaluation and the teacher, against plain PyTorch."""

import base64
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine
import jobs
import models
from data import Batches, Split
from outputs import Outputs
from recipes import RECIPES
from teacher import Teacher
from util.runtime import Diverged, Runtime

CPU = torch.device("cpu")


def some(split, n):
    return Split(split.images[:n], split.labels[:n])


def digits_batches(digits, n=60, batch_size=32, **options):
    return Batches(some(digits.train, n), digits.mean, digits.std, batch_size, CPU, **options)


def student(seed=0, kind="student"):
    torch.manual_seed(seed)
    return models.build(kind, 10).to(memory_format=torch.channels_last)


class Loss(torch.nn.Module):
    """An objective: a function of the student's logits and the labels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, student, teacher, labels, alpha, mixed, gather):
        return {"loss": self.function(student.logits, labels)}


def fit(network, batches, loss=F.cross_entropy, epochs=1, rate=lambda epoch, iteration: 0.001, **options):
    options = {"objective": Loss(loss), "alpha": torch.ones(epochs, len(batches)), **options}
    return list(engine.fit(network, batches, learning_rate=rate, runtime=Runtime(CPU, "fp32"), **options))


def test_step_lr():
    rates = [engine.step_lr(0.001, epoch, 20) for epoch in (0, 19, 20, 39, 40)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


def test_fit_is_plain_adam(digits):
    """Two epochs of three batches, the last one short, against torch.optim and StepLR used as in a tutorial."""
    network, expected = student(), student()
    batches = digits_batches(digits, n=70, shuffle=True)
    optimiser = torch.optim.Adam(expected.parameters(), lr=0.001)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 1)
    losses, over_batches = [], []
    for epoch in range(2):
        total, means = 0.0, []
        for batch in batches.epoch(epoch):
            loss = F.cross_entropy(expected(batch.images).logits, batch.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(batch.labels)
            means.append(loss.item())
        schedule.step()
        losses.append(total / 70)
        over_batches.append(sum(means) / 3)
    alpha = torch.tensor([[0.0, 0.1, 0.5], [1.0, 1.0, 1.0]])
    given = fit(network, batches, rate=lambda epoch, iteration: engine.step_lr(0.001, epoch, 1), alpha=alpha)
    assert [figures["train_loss"] for figures in given] == pytest.approx(losses, rel=1e-3)
    assert [figures["train_loss_over_batches"] for figures in given] == pytest.approx(over_batches, rel=1e-3)
    assert [figures["alpha"] for figures in given] == pytest.approx([0.2, 1.0])
    assert [figures["learning_rate"] for figures in given] == pytest.approx([1e-3, 1e-4])
    assert [figures["epoch"] for figures in given] == [1, 2]


def test_fit_repeats_itself(digits):
    weights = []
    for _ in range(2):
        network = student()
        fit(network, digits_batches(digits, shuffle=True))
        weights.append(network.state_dict())
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(digits, value):
    steps = iter([value, 1])
    with pytest.raises(Diverged, match="epoch 1"):
        fit(student(), digits_batches(digits), lambda logits, labels: logits.sum() * next(steps))


def test_weights_that_are_not_finite_stop(digits):
    """A last step whose loss is finite and whose gradient is not."""
    with pytest.raises(Diverged):
        fit(student(), digits_batches(digits, n=32), lambda logits, labels: (logits.sum() * 0).abs().sqrt())


def reference_figures(network, digits):
    """As a tutorial tests: batches of 256 in order, mean cross-entropy a batch."""
    images = digits.test.images.permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(digits.mean)[:, None, None]) / torch.tensor(digits.std)[:, None, None]
    total, top1, top5 = 0.0, 0, 0
    with torch.no_grad():
        for pixels, labels in zip(images.split(256), digits.test.labels.split(256), strict=True):
            logits = network.eval()(pixels).logits
            total += F.cross_entropy(logits, labels).item()
            ranked = logits.argsort(1, descending=True)
            top1 += (ranked[:, 0] == labels).sum().item()
            top5 += (ranked[:, :5] == labels[:, None]).sum().item()
    n = len(digits.test.labels)
    return 100 * top1 / n, 100 * top5 / n, total / n


@pytest.mark.parametrize("batch_size", [297, 100, 64])
def test_evaluate(digits, cpu, scaled_like_trained, batch_size):
    network = scaled_like_trained(student())
    top1, top5, test_loss = reference_figures(network, digits)
    batches = Batches(digits.test, digits.mean, digits.std, batch_size, CPU)
    figures = engine.evaluate(network, batches, cpu)
    assert (figures["top1"], figures["top5"]) == (pytest.approx(top1), pytest.approx(top5))
    assert figures["test_loss"] == pytest.approx(test_loss, rel=1e-5)
    assert figures["images"] == 297
    # 297 images are batches of 256 and 41, so the mean of all is not the sum over batches.
    assert figures["mean_ce"] / 297 * 2 != pytest.approx(figures["test_loss"], rel=1e-4)


def test_the_test_loss_is_of_the_official_order(digits, cpu, scaled_like_trained):
    """The images of the short last batch weigh more; nothing else depends on the order."""
    network, order = scaled_like_trained(student()), torch.arange(297).flip(0)
    inference = {"mean": digits.mean, "std": digits.std, "batch_size": 100, "device": CPU}
    as_given = engine.evaluate(network, Batches(digits.test, **inference), cpu)
    ordered = engine.evaluate(network, Batches(digits.test, **inference), cpu, order)
    turned = Split(digits.test.images[order], digits.test.labels[order])
    expected = engine.evaluate(network, Batches(turned, **inference), cpu)
    assert (
        ordered["test_loss"] == pytest.approx(expected["test_loss"]) != pytest.approx(as_given["test_loss"], rel=1e-5)
    )
    assert ordered | {"test_loss": 0} == as_given | {"test_loss": 0, "order": "official"}


class Fixed(models.CifarResNet):
    """Gives the logits that it is told, whatever the images."""

    def forward(self, images):
        return Outputs(logits=self.answer.expand(len(images), -1))


def fixed(answer):
    network = models.build("student", len(answer))
    network.__class__, network.answer = Fixed, torch.tensor(answer)
    return network


def test_a_network_that_cannot_tell_classes_apart_scores_by_chance(digits, cpu):
    batches = Batches(digits.test, digits.mean, digits.std, 100, CPU)
    figures = engine.evaluate(fixed([0.0] * 10), batches, cpu)
    assert figures["top1"] < 15 and figures["top5"] < 60
    assert figures["mean_ce"] == pytest.approx(math.log(10), rel=1e-5)


def test_top5_of_three_classes(cpu):
    split = Split(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2]))
    figures = engine.evaluate(fixed([0.0, 5.0, 1.0]), Batches(split, (0, 0, 0), (1, 1, 1), 4, CPU), cpu)
    assert figures["top1"] == pytest.approx(100 / 3) and figures["top5"] == 100


def test_evaluate_changes_nothing(digits, cpu):
    network = student().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    engine.evaluate(network, Batches(some(digits.test, 30), digits.mean, digits.std, 30, CPU), cpu)
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


@pytest.fixture(scope="module")
def teacher_network():
    torch.manual_seed(1)
    return models.build("teacher", 10)


def test_distilling_leaves_the_teacher_as_it_is(digits, cpu, teacher_network):
    teacher, network = Teacher(teacher_network, cpu, "", 0.0), student(kind="feature_student")
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    start = {key: value.clone() for key, value in network.state_dict().items()}
    batches = digits_batches(digits)
    source, objective = jobs.aim(RECIPES["distillation_LDH"], network, teacher, batches)
    fit(network, batches, objective=objective, teacher=source)
    assert all(value.equal(before[key]) for key, value in teacher.network.state_dict().items())
    assert not any(value.equal(start[key]) for key, value in network.state_dict().items() if "weight" in key)


def test_which_images_were_right(digits, cpu):
    split = some(digits.test, 30)
    figures = engine.evaluate(fixed([0.0] * 3 + [1.0] + [0.0] * 6), Batches(split, (0,) * 3, (1,) * 3, 7, CPU), cpu)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(figures["correct"]), np.uint8))[:30]
    assert bits.tolist() == (split.labels == 3).int().tolist() and 0 < bits.sum() < 30


def test_validation_stands_in_the_epochs_figures(digits):
    asked = iter([{"val_loss": 2.0, "val_top1": 10.0}, {"val_loss": 1.0, "val_top1": 20.0}])
    given = fit(student(), digits_batches(digits, n=32), epochs=2, validate=lambda: next(asked))
    assert [(figures["val_loss"], figures["val_top1"]) for figures in given] == [(2.0, 10.0), (1.0, 20.0)]


def test_what_an_objective_learns_is_trained(digits):
    loss = Loss(lambda logits, labels: F.cross_entropy(logits * loss.scale, labels))
    loss.scale = torch.nn.Parameter(torch.tensor(1.0))
    fit(student(), digits_batches(digits, n=32), objective=loss)
    assert loss.scale.item() == pytest.approx(1.0, abs=0.002) and loss.scale.item() != 1.0  # one step of Adam


def test_an_objective_draws_before_each_step(digits):
    loss, drawn = Loss(F.cross_entropy), []
    loss.draw = lambda: drawn.append(loss.training)
    fit(student(), digits_batches(digits), objective=loss, epochs=2)
    assert len(drawn) == 4


def test_a_state_keeps_the_random_stream_of_the_device(digits, cpu, monkeypatch):
    given, network, objective = [], student(), Loss(F.cross_entropy)
    gpu = SimpleNamespace(get_rng_state=lambda: torch.tensor([7]), set_rng_state=given.append)
    monkeypatch.setattr(engine, "_accelerator", lambda runtime: gpu)
    parts = network, objective, engine.adam(network.parameters())
    state = engine._snapshot(*parts, engine.Position(), cpu)
    engine._restore(state, *parts, cpu)
    del state["random_device"]  # as older states are
    engine._restore(state, *parts, cpu)
    assert given == [torch.tensor([7])]
