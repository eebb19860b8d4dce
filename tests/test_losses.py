"""Losses and schedules against figures worked out with numpy in float64, or by hand."""

import dataclasses

import numpy as np
import pytest
import torch

import losses
from models import build
from outputs import Outputs
from recipes import RECIPES, ROWS, Recipe

B, C = 5, 7
rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(B, C)) * 3, rng.normal(size=(B, C)) * 3
PROJECTED, MAP = rng.normal(size=(B, 6, 2, 2)), rng.normal(size=(B, 6, 2, 2))
HEAD = rng.normal(size=(6, C))
LABELS = rng.integers(0, C, B)


def tensor(array):
    return torch.tensor(array, dtype=torch.float32)


def head(maps):
    return maps.mean((2, 3)) @ tensor(HEAD)


def outputs():
    student = Outputs(logits=tensor(STUDENT).requires_grad_(), projected=tensor(PROJECTED).requires_grad_())
    return student, Outputs(logits=tensor(TEACHER), last_map=tensor(MAP), head=head), torch.tensor(LABELS)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)


def np_ce(logits):
    return -log_softmax(logits)[np.arange(B), LABELS].mean()


def np_kd(T):
    log_s, log_t = log_softmax(STUDENT / T), log_softmax(TEACHER / T)
    return T**2 / B * (np.exp(log_t) * (log_t - log_s)).sum()


NP_MSE = ((PROJECTED - MAP) ** 2).mean()
NP_S2T = np_ce(PROJECTED.mean((2, 3)) @ HEAD)


def test_cross_entropy():
    student, _, labels = outputs()
    assert losses.cross_entropy(student, labels).item() == pytest.approx(np_ce(STUDENT), rel=1e-6)


def test_cross_entropy_by_hand():
    # softmax(0, ln 3) = (1/4, 3/4)
    student = Outputs(logits=torch.tensor([[0.0, np.log(3.0)]]))
    assert losses.cross_entropy(student, torch.tensor([0])).item() == pytest.approx(np.log(4), rel=1e-6)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 4.0])
def test_kd(T):
    assert losses.kd(*outputs(), T=T).item() == pytest.approx(np_kd(T), rel=1e-5)


def test_kd_by_hand():
    # T 2: p_t = (1/4, 3/4), p_s = (1/2, 1/2): 4 (1/4 ln 1/2 + 3/4 ln 3/2)
    student = Outputs(logits=torch.zeros(1, 2))
    teacher = Outputs(logits=torch.tensor([[0.0, 2 * np.log(3.0)]]))
    expected = 4 * (0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert losses.kd(student, teacher, torch.tensor([0]), T=2).item() == pytest.approx(expected, rel=1e-5)


def test_kd_stands_large_logits():
    logits = tensor([[1e4, -1e4, 0.0]])
    value = losses.kd(Outputs(logits=logits), Outputs(logits=-logits), torch.tensor([0]), T=1)
    assert value.isfinite() and value > 0


def test_feature_mse():
    assert losses.feature_mse(*outputs()).item() == pytest.approx(NP_MSE, rel=1e-6)


def test_s2t():
    assert losses.s2t(*outputs()).item() == pytest.approx(NP_S2T, rel=1e-5)


def test_soft_losses_are_zero_where_student_equals_teacher():
    _, teacher, labels = outputs()
    same = Outputs(logits=teacher.logits, projected=teacher.last_map)
    assert losses.kd(same, teacher, labels, T=2).abs() < 1e-6
    assert losses.feature_mse(same, teacher, labels) == 0


def test_bf16_outputs_give_float32_losses():
    student, teacher, labels = outputs()
    student = Outputs(logits=student.logits.bfloat16(), projected=student.projected.bfloat16())
    values = losses.Objective(RECIPES["distillation_LDH"])(student, teacher, labels, torch.tensor(0.7))
    assert {value.dtype for value in values.values()} == {torch.float32}


EXPECTED = {  # alpha CE + (1 - alpha) soft + beta MSE + gamma S2T, from the table of the experiments
    "teacher": lambda a: a * np_ce(STUDENT),  # whose alpha is 1
    "student": lambda a: a * np_ce(STUDENT),
    "distillation": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2),
    "distillation_KMJ2": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2),
    "distillation_KMJ1": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2),
    "distillation_KMJ0": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2),
    "distillation_LDH": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2) + 0.5 * NP_MSE,
    "distillation_LDH2": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2) + 0.2 * NP_S2T,
    "distillation_LDH3": lambda a: a * np_ce(STUDENT) + (1 - a) * np_kd(2) + 0.1 * NP_S2T,
    "distillation_LDH5": lambda a: a * np_ce(STUDENT) + (1 - a) * NP_MSE,
    "distillation_LDH6": lambda a: a * np_ce(STUDENT) + (1 - a) * NP_MSE,
    "distillation_LDH9": lambda a: a * np_ce(STUDENT) + (1 - a) * NP_MSE,
    "distillation_LDH10": lambda a: a * np_ce(STUDENT) + (1 - a) * NP_MSE,
}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("recipe", ROWS, ids=lambda row: row.job)
def test_objective(recipe, alpha):
    values = losses.Objective(recipe)(*outputs(), torch.tensor(alpha))
    assert values["loss"].item() == pytest.approx(EXPECTED[recipe.job](alpha), rel=1e-5)


def test_terms_come_back_before_their_weights():
    values = losses.Objective(RECIPES["distillation_LDH"])(*outputs(), torch.tensor(0.7))
    expected = {"ce": np_ce(STUDENT), "kd": np_kd(2), "mse": NP_MSE}
    assert {name: values[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(values) == {"loss", *expected}


@pytest.mark.parametrize("job", ["distillation", "distillation_LDH", "distillation_LDH2", "distillation_LDH6"])
def test_gradients_reach_the_student_alone(job):
    recipe = RECIPES[job]
    torch.manual_seed(0)
    student, teacher = build(recipe.network, 10), build("teacher", 10).eval().requires_grad_(False)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        targets = teacher(images)._replace(head=teacher.classify)
    values = losses.Objective(recipe)(student(images), targets, torch.arange(4), torch.tensor(0.5))
    values["loss"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_s2t_gradient_passes_through_the_teachers_head():
    student, teacher, labels = outputs()
    losses.s2t(student, teacher, labels).backward()
    # d CE / d map = head (softmax - one hot) / B, spread evenly over the 2x2 positions
    logits = PROJECTED.mean((2, 3)) @ HEAD
    error = np.exp(log_softmax(logits)) - np.eye(C)[LABELS]
    expected = np.repeat((error @ HEAD.T / B / 4)[:, :, None], 4, axis=2).reshape(PROJECTED.shape)
    np.testing.assert_allclose(student.projected.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_constant_alpha():
    assert losses.alpha_schedule(0.7, 3, 4).equal(torch.full((3, 4), 0.7))


def test_alpha_per_epoch():
    expected = [[0, 0], [1 / 3, 1 / 3], [2 / 3, 2 / 3], [1, 1]]
    torch.testing.assert_close(losses.alpha_schedule("per epoch", 4, 2), tensor(expected))


def test_alpha_per_iteration():
    expected = [[0, 1 / 5, 2 / 5], [3 / 5, 4 / 5, 1]]
    torch.testing.assert_close(losses.alpha_schedule("per iteration", 2, 3), tensor(expected))


def test_alpha_first_epoch():
    expected = [[0, 1 / 2, 1], [1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(losses.alpha_schedule("first epoch", 3, 3), tensor(expected))


@pytest.mark.parametrize(
    "name, epochs, n, expected",
    [
        ("per epoch", 1, 3, [[1, 1, 1]]),
        ("per iteration", 1, 1, [[1]]),
        ("first epoch", 1, 1, [[1]]),
        ("first epoch", 2, 1, [[1], [1]]),
        ("first epoch", 1, 2, [[0, 1]]),
        ("each epoch", 2, 1, [[1], [1]]),
        ("cosine", 1, 1, [[1]]),
        ("cosine", 1, 2, [[0, 1]]),
    ],
)
def test_alpha_of_single_steps(name, epochs, n, expected):
    assert losses.alpha_schedule(name, epochs, n).equal(tensor(expected))


def test_alpha_each_epoch():
    expected = [[0, 1 / 2, 1], [0, 1 / 2, 1]]
    torch.testing.assert_close(losses.alpha_schedule("each epoch", 2, 3), tensor(expected))


def test_alpha_after_the_first_epoch():
    expected = [[0, 1 / 2, 1], [0.7, 0.7, 0.7], [0.7, 0.7, 0.7]]
    torch.testing.assert_close(losses.alpha_schedule("first epoch, then 0.7", 3, 3), tensor(expected))
    expected = [[0, 1 / 2, 1], [1 / 2, 1 / 2, 1 / 2], [1, 1, 1]]
    torch.testing.assert_close(losses.alpha_schedule("first epoch, then per epoch", 3, 3), tensor(expected))


def test_alpha_cosine():
    expected = [[0, (1 - np.sqrt(1 / 2)) / 2, 1 / 2, (1 + np.sqrt(1 / 2)) / 2, 1]]
    torch.testing.assert_close(losses.alpha_schedule("cosine", 1, 5), tensor(expected))
    # It goes over all iterations: the half of 3 epochs of 3 is in the middle of the second.
    assert losses.alpha_schedule("cosine", 3, 3)[1, 1] == 0.5


def test_alpha_descending():
    torch.testing.assert_close(
        losses.alpha_schedule("per epoch, descending", 4, 2), tensor([[1, 1], [2 / 3, 2 / 3], [1 / 3, 1 / 3], [0, 0]])
    )
    expected = [[1, 1 / 2, 0], [0.3, 0.3, 0.3]]
    torch.testing.assert_close(losses.alpha_schedule("first epoch, then 0.7, descending", 2, 3), tensor(expected))


ASCENDING = [
    "per epoch",
    "per iteration",
    "each epoch",
    "first epoch",
    "first epoch, then 0.7",
    "first epoch, then per epoch",
    "cosine",
]


def test_every_schedule_has_its_descending_twin():
    names = ASCENDING + [f"{name}, descending" for name in ASCENDING]
    assert list(losses.ALPHA_SCHEDULES) == names + list(losses.SUMS)
    assert all(f'"{name.partition(",")[0]}"' in losses.alpha_schedule.__doc__ for name in ASCENDING)


@pytest.mark.parametrize("name", ASCENDING)
@pytest.mark.parametrize("epochs, n", [(1, 1), (1, 3), (4, 1), (50, 196)])
def test_alpha_is_a_weight_and_its_twin_the_rest(name, epochs, n):
    schedule, twin = (losses.alpha_schedule(x, epochs, n) for x in (name, f"{name}, descending"))
    for values in (schedule, twin):
        assert values.shape == (epochs, n) and values.dtype == torch.float32
        assert values.min() >= 0 and values.max() <= 1
    torch.testing.assert_close(schedule + twin, torch.ones(epochs, n))
    if epochs * n == 1:
        assert schedule == 1 and twin == 0


@pytest.mark.parametrize("name", ASCENDING)
def test_alpha_ends_exactly(name):
    end, rest = torch.tensor([0.7, 0.3] if name.endswith("0.7") else [1.0, 0.0])
    schedule, twin = (losses.alpha_schedule(x, 50, 196) for x in (name, f"{name}, descending"))
    assert schedule[0, 0] == 0 and schedule[-1, -1] == end
    assert twin[0, 0] == 1 and twin[-1, -1] == pytest.approx(rest.item(), abs=1e-7)


def test_the_share_of_the_soft_loss_in_a_sum():
    """1, or, warming up, min((e + 1) / 20, 1) of the field's 240 epochs, and in proportion of others."""
    share = {name: 1 - losses.alpha_schedule(name, 240, 3) for name in losses.SUMS}
    assert share["sum"].eq(1).all()
    expected = [min((e + 1) / 20, 1) for e in range(240)]
    torch.testing.assert_close(share["sum, warm-up"], torch.tensor(expected).unsqueeze(1).expand(240, 3))
    assert (1 - losses.alpha_schedule("sum, warm-up", 24, 1)).flatten()[:3].tolist() == [0.5, 1.0, 1.0]
    assert (1 - losses.alpha_schedule("sum, warm-up", 3, 1)).eq(1).all()


@pytest.mark.parametrize(
    ("alpha", "hard", "soft"), [("sum", 1.0, 1.0), ("sum, warm-up", 1.0, 0.25), (0.75, 0.75, 0.25)]
)
@pytest.mark.parametrize(("given", "weight"), [(None, 3000.0), (7.0, 7.0)])
def test_weights(monkeypatch, alpha, hard, soft, given, weight):
    """A loss has its published weight unless a recipe has another, whatever alpha; in a sum the hard labels have 1."""
    monkeypatch.setitem(losses.LOSSES, "mse", dataclasses.replace(losses.LOSSES["mse"], weight=3000.0))
    recipe = Recipe("row", "row", "student", 1, 1, soft="mse", alpha=alpha, weight=given)
    values = losses.Objective(recipe)(*outputs(), torch.tensor(1 - soft))
    torch.testing.assert_close(values["loss"], hard * values["ce"] + soft * weight * values["mse"])


def test_published_weights():
    weights = {name: loss.weight for name, loss in losses.LOSSES.items() if loss.weight != 1}
    assert weights == {"fitnet": 100.0, "at": 1000.0, "sp": 3000.0, "pkt": 30000.0, "crd": 0.8}
