"""The losses of logits: against the papers' equations written out in Python, element by element, and at the edges."""

import math

import pytest
import torch

import losses
import models
from losses import LOSSES, Objective, settings_of
from outputs import Outputs
from recipes import Recipe

LOGIT_LOSSES = [
    name
    for name, loss in LOSSES.items()
    if loss.needs in (("logits",), ("logits", "prototypes")) and not loss.projects and not loss.parts
]
STANDARDISED = [name for name in LOGIT_LOSSES if "standardise" in LOSSES[name].settings]


def row(name, **settings):
    return Recipe(f"distillation_{name}", name, "student", 1, 1, soft=name, alpha=0.5, settings=settings)


def prototypes(classes):
    """The weights of a teacher's last layer, a row for each class."""
    return torch.randn(classes, 4, generator=torch.Generator().manual_seed(1))


def of_teacher(logits):
    return Outputs(logits=logits, prototypes=prototypes(logits.shape[1]))


def value_of(name, student, teacher, labels, **settings):
    """The loss as a training gets it: its settings, and where there is none its default. teacher: logits or outputs."""
    settings = settings_of(row(name, **settings))
    teacher = teacher if isinstance(teacher, Outputs) else of_teacher(teacher)
    return LOSSES[name].function(Outputs(logits=student), teacher, labels, **settings)


def batch(images=6, classes=5, scale=3.0, seed=0):
    """Logits of student and teacher, and labels, of which some are the teacher's first, some its last class."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(images, classes, generator=generator) * scale for _ in range(2))
    labels = torch.randint(classes, (images,), generator=generator)
    labels[0] = teacher[0].argmax()
    labels[-1] = teacher[-1].argmin()
    return student, teacher, labels


# The references: lists of Python's floats, so in float64.


def softmax(logits, T):
    total = sum(math.exp(z / T) for z in logits)
    return [math.exp(z / T) / total for z in logits]


def kl(p, q):
    return sum(p[i] * math.log(p[i] / q[i]) for i in range(len(p)))


def pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    norms = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return covariance / (norms + 1e-8)  # as the authors' code has it


def reference_kd(student, teacher, labels, T):
    return T**2 * sum(kl(softmax(t, T), softmax(s, T)) for s, t in zip(student, teacher, strict=True)) / len(labels)


def reference_dkd(student, teacher, labels, T, tckd, nckd):
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax(s, T), softmax(t, T)
        target = kl([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        others = [i for i in range(len(s)) if i != y]
        non_target = kl([p_t[i] / (1 - p_t[y]) for i in others], [p_s[i] / (1 - p_s[y]) for i in others])
        total += tckd * target + nckd * non_target
    return T**2 * total / len(labels)


def reference_dist(student, teacher, labels, T, inter, intra):
    p_s, p_t = [softmax(s, T) for s in student], [softmax(t, T) for t in teacher]
    images, classes = range(len(p_s)), range(len(p_s[0]))
    rows = sum(1 - pearson(p_s[i], p_t[i]) for i in images) / len(images)
    columns = sum(1 - pearson([p[j] for p in p_s], [p[j] for p in p_t]) for j in classes) / len(classes)
    return T**2 * (inter * rows + intra * columns)


def reference_rld(student, teacher, labels, T, T_scd, scd, mcd):
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        sure, right = max(softmax(t, T_scd)), softmax(s, T_scd)[y]
        total += scd * T_scd**2 * kl([sure, 1 - sure], [right, 1 - right])
        below = [i for i in range(len(t)) if t[i] < t[y]]
        if below:
            total += mcd * T**2 * kl(softmax([t[i] for i in below], T), softmax([s[i] for i in below], T))
    return total / len(labels)


def cosine(x, y):
    product = sum(a * b for a, b in zip(x, y, strict=True))
    return product / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def reference_wkd_l(student, teacher, labels, T, wd, kappa, eta):
    """Each image by itself, the class of its label taken out of everything."""
    weights, total = prototypes(len(student[0])).double().tolist(), 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        total -= softmax(t, 1)[y] * math.log(softmax(s, 1)[y])
        classes = [i for i in range(len(s)) if i != y]
        n = range(len(classes))
        q_s, q_t = (softmax([logits[i] for i in classes], T) for logits in (s, t))
        costs = [[1 - math.exp(-kappa * (1 - cosine(weights[i], weights[j]))) for j in classes] for i in classes]
        kernel = [[math.exp(-costs[i][j] / eta) for j in n] for i in n]
        u = [1 / len(classes) for _ in n]
        for _ in range(10):
            v = [q_t[j] / (sum(kernel[i][j] * u[i] for i in n) + 1e-8) for j in n]
            u = [q_s[i] / (sum(kernel[i][j] * v[j] for j in n) + 1e-8) for i in n]
        total += wd * sum(u[i] * kernel[i][j] * v[j] * costs[i][j] for i in n for j in n)
    return total / len(labels)


REFERENCES = {
    "kd": reference_kd,
    "dkd": reference_dkd,
    "dist": reference_dist,
    "rld": reference_rld,
    "wkd_l": reference_wkd_l,
}
OTHER = {  # settings, none a default and no two alike
    "kd": [{"T": 1.5}],
    "dkd": [{"T": 2.0, "tckd": 3.0, "nckd": 0.5}, {"nckd": 0.0}, {"tckd": 0.0}],
    "dist": [{"T": 1.5, "inter": 3.0, "intra": 0.5}, {"inter": 0.0}, {"intra": 0.0}],
    "rld": [{"T": 2.0, "T_scd": 1.5, "scd": 3.0, "mcd": 0.5}, {"scd": 0.0}, {"mcd": 0.0}],
    "wkd_l": [{"T": 2.0, "wd": 30.0, "kappa": 0.5, "eta": 0.1}, {"wd": 0.0}],
}


@pytest.mark.parametrize("name, settings", [(name, own) for name in OTHER for own in [{}, *OTHER[name]]], ids=str)
@pytest.mark.parametrize("images, classes", [(6, 5), (2, 2), (3, 40)])
def test_against_the_equation(name, settings, images, classes):
    student, teacher, labels = batch(images, classes)
    all_settings = settings_of(row(name, **settings))
    del all_settings["standardise"]
    expected = REFERENCES[name](student.double().tolist(), teacher.double().tolist(), labels.tolist(), **all_settings)
    assert value_of(name, student, teacher, labels, **settings).item() == pytest.approx(expected, rel=2e-5, abs=3e-5)


def test_published_defaults():
    published = {
        "kd": {"T": 4, "standardise": 0},
        "dkd": {"T": 4, "tckd": 1, "nckd": 8, "standardise": 0},
        "dist": {"T": 4, "inter": 2, "intra": 2, "standardise": 0},
        "rld": {"T": 4, "T_scd": 1, "scd": 1, "mcd": 8, "standardise": 0},
        "wkd_l": {"T": 8, "wd": 600, "kappa": 1, "eta": 0.05, "standardise": 0},
    }
    assert {name: settings_of(row(name)) for name in published} == published


def test_dkd_is_kd_where_its_weights_say_so():
    """KD = TCKD + (1 - p_t[y]) NCKD, for one image."""
    student, teacher, labels = batch(1)
    weight = 1 - torch.softmax(teacher / 4, dim=1)[0, labels[0]].item()
    decoupled = value_of("dkd", student, teacher, labels, tckd=1.0, nckd=weight)
    torch.testing.assert_close(decoupled, value_of("kd", student, teacher, labels))


def test_dkd_of_two_classes_is_kd():
    """There is one class besides the target, so nothing to be known among the others."""
    student, teacher, labels = batch(4, classes=2)
    assert value_of("dkd", student, teacher, labels, tckd=0.0) == 0
    torch.testing.assert_close(value_of("dkd", student, teacher, labels), value_of("kd", student, teacher, labels))


def test_dist_by_hand():
    """Two classes: the correlation over an image's classes is 1 or -1; over two images, of each class likewise."""
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0])
    assert value_of("dist", student, teacher, labels, T=1.0, intra=0.0).item() == pytest.approx(2 * (0 + 2) / 2)
    # The student's first class goes down from image to image, the teacher's up.
    assert value_of("dist", student, teacher, labels, T=1.0, inter=0.0).item() == pytest.approx(2 * 2)


def test_dist_of_one_image_has_no_part_within_classes():
    student, teacher, labels = batch(1)
    student.requires_grad_()
    value = value_of("dist", student, teacher, labels, inter=0.0)
    value.backward()
    assert value == 2 * 4**2 and (student.grad == 0).all()


def test_rld_leaves_out_what_the_teacher_has_above_the_label():
    """A teacher that is wrong has no say in the order of the label and of the classes above it."""
    student, teacher = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[9.0, 1.0, 5.0, 2.0]])
    student.requires_grad_()
    value_of("rld", student, teacher, torch.tensor([2]), scd=0.0).backward()
    assert (student.grad[0, [0, 2]] == 0).all() and (student.grad[0, [1, 3]] != 0).all()


def test_rld_of_a_label_that_is_last_is_its_confidence_alone():
    student, teacher, _ = batch(3)
    labels = teacher.argmin(1)
    assert value_of("rld", student, teacher, labels, scd=0.0) == 0


def test_wkd_l_carries_everything_to_where_the_teacher_has_it():
    """Student and teacher sure of different classes, neither the label's: the cost of the way between the two."""
    weights = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    student, teacher = torch.tensor([[0.0, 0.0, 400.0, 0.0]]), torch.tensor([[0.0, 400.0, 0.0, 0.0]])
    found = value_of("wkd_l", student, Outputs(logits=teacher, prototypes=weights), torch.tensor([3]), T=1.0, wd=1.0)
    assert found.item() == pytest.approx(1 - math.exp(-(1 - 0.8)), rel=1e-4)


def test_wkd_l_pays_less_for_a_class_that_is_like_the_teachers():
    weights = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0], [0.0, -1.0]])
    teacher = Outputs(logits=torch.tensor([[9.0, 0.0, 0.0, 0.0]]), prototypes=weights)
    like, unlike = torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0, 0.0]])
    near, far = (value_of("wkd_l", student, teacher, torch.tensor([3]), T=1.0) for student in (like, unlike))
    assert near < far / 3


def test_wkd_l_is_refused_for_a_teacher_without_a_final_linear_layer():
    student, teacher = (models.build(name, 5, "standard") for name in ("shufflenet_v2_x0_5", "squeezenet1_1"))
    with pytest.raises(losses.UserError, match="the loss wkd_l compares classes by the teacher's final linear layer"):
        Objective(row("wkd_l"), *(models.shapes(network, 64, 1) for network in (student, teacher)))


# Standardised logits


def z_score(logits):
    mean = sum(logits) / len(logits)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [(z - mean) / deviation for z in logits]


def test_any_loss_of_logits_may_standardise_them():
    assert set(REFERENCES) <= set(STANDARDISED)


@pytest.mark.parametrize("name", REFERENCES)
def test_standardised_against_the_equation(name):
    student, teacher, labels = batch()
    own = settings_of(row(name, T=2.0))
    del own["standardise"]
    z_s, z_t = ([z_score(image) for image in logits.double().tolist()] for logits in (student, teacher))
    expected = REFERENCES[name](z_s, z_t, labels.tolist(), **own)
    value = value_of(name, student, teacher, labels, T=2.0, standardise=1)
    assert value.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", STANDARDISED)
def test_standardised_logits_have_no_scale_and_no_offset(name):
    student, teacher, labels = batch()
    value = value_of(name, student, teacher, labels, standardise=1)
    scaled = value_of(name, 7 * student - 3, teacher / 5 + 11, labels, standardise=1)
    torch.testing.assert_close(scaled, value, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(value_of(name, 7 * student - 3, teacher / 5 + 11, labels), value)


def test_standardise_is_yes_or_no():
    with pytest.raises(losses.UserError, match="--standardise: 0.5 is not 1 .yes. or 0 .no."):
        settings_of(row("kd", standardise=0.5))


# All losses of logits, those to come as well

CASES = {name: {} for name in LOGIT_LOSSES} | {f"{name}, standardised": {"standardise": 1} for name in STANDARDISED}


@pytest.fixture(params=CASES)
def loss(request):
    """A function of the logits of student and teacher and of the labels."""
    name = request.param.partition(",")[0]
    return lambda *batch: value_of(name, *batch, **CASES[request.param])


@pytest.mark.parametrize("images, classes", [(4, 5), (1, 5), (3, 2)])
def test_gradient_against_finite_differences(loss, images, classes):
    student, teacher, labels = batch(images, classes, scale=1.0)
    student.requires_grad_()
    loss(student, teacher, labels).backward()
    step = 0.02
    for i in range(images):
        for j in range(classes):
            move = torch.zeros_like(student)
            move[i, j] = step
            with torch.no_grad():
                up, down = (loss(student + sign * move, teacher, labels).double() for sign in (1, -1))
            assert student.grad[i, j].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=0.01, abs=2e-3)


def spread(images, classes):
    logits = torch.zeros(images, classes)
    logits[:, 0], logits[:, -1] = 1e4, -1e4
    return logits


FAR = {  # what makes the logits of student and teacher, from images and classes
    "agree": lambda *shape: (batch(*shape)[0], batch(*shape)[0]),
    "agree, 1e4 apart": lambda *shape: (spread(*shape), spread(*shape)),
    "1e4 apart": lambda *shape: (spread(*shape), spread(*shape).flip(1)),
    "one is 1e4 apart": lambda *shape: (spread(*shape), batch(*shape)[1]),
    "the other is 1e4 apart": lambda *shape: (batch(*shape)[0], spread(*shape)),
    "far from 0": lambda *shape: (batch(*shape)[0] + 1e4, batch(*shape)[1] - 1e4),
    "the student's are equal": lambda *shape: (torch.full(shape, 0.1), batch(*shape)[1]),
    "the teacher's are equal": lambda *shape: (batch(*shape)[0], torch.full(shape, 0.1)),
    "all are equal": lambda *shape: (torch.full(shape, 0.1), torch.zeros(*shape)),
}


@pytest.mark.parametrize("images, classes", [(6, 5), (1, 5), (6, 2), (1, 2), (3, 100)])
@pytest.mark.parametrize("label", [0, -1])
@pytest.mark.parametrize("far", FAR)
def test_finite_and_not_negative_at_the_edges(loss, far, label, images, classes):
    student, teacher = FAR[far](images, classes)
    student.requires_grad_()
    value = loss(student, teacher, torch.full((images,), label % classes))
    value.backward()
    assert value.isfinite() and value > -1e-4
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in STANDARDISED if name != "dist"])
def test_standardised_equal_logits_have_a_gradient_of_ordinary_size(name):
    """As a classifier that starts from zero gives them; a Pearson correlation has no such gradient itself."""
    _, teacher, labels = batch()
    student = torch.full_like(teacher, 0.1).requires_grad_()
    value_of(name, student, teacher, labels, standardise=1).backward()
    assert 0 < student.grad.abs().max() < 1e5


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("wkd_l")])
def test_least_where_student_and_teacher_agree(name):
    """There the gradient is 0; but the labels have a say in rld's, where the teacher is wrong, and in wkd_l's."""

    def loss(*batch):
        return value_of(name.partition(",")[0], *batch, **CASES[name])

    student, teacher, _ = batch(images=8)
    labels = teacher.argmax(1)
    same = teacher.clone().requires_grad_()
    value = loss(same, teacher, labels)
    value.backward()
    # float32 leaves up to 7e-5 of sums that are 0.
    assert value.item() == pytest.approx(0, abs=1e-3) and same.grad.abs().max() < 1e-3
    assert loss(student, teacher, labels) > 0.01


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_the_logits_does_not_matter(loss, offset):
    student, teacher, labels = batch()
    student, teacher = ((x * 64).round() / 64 for x in (student, teacher))  # which such an offset leaves exact
    torch.testing.assert_close(
        loss(student + offset, teacher + offset, labels), loss(student, teacher, labels), rtol=0.01, atol=0.01
    )


def test_mean_over_the_images(loss):
    """Each image twice is as each once: a short last batch weighs its images alike."""
    student, teacher, labels = batch()
    twice = (torch.cat([x, x]) for x in (student, teacher, labels))
    torch.testing.assert_close(loss(*twice), loss(student, teacher, labels), rtol=1e-4, atol=1e-5)


def test_order_of_the_images_and_of_the_classes_does_not_matter(loss):
    student, teacher, labels = batch()
    images, classes = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 4, 0, 1, 3])
    taught = Outputs(logits=teacher[images][:, classes], prototypes=prototypes(5)[classes])
    moved = student[images][:, classes], taught, classes.argsort()[labels[images]]
    torch.testing.assert_close(loss(*moved), loss(student, teacher, labels), rtol=1e-4, atol=1e-5)


def test_bf16_logits_are_as_their_float32_values(loss):
    student, teacher, labels = batch()
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    value = loss(student, teacher, labels)
    value.backward()
    assert value.dtype == torch.float32 and value == loss(student.float(), teacher.float(), labels)
    assert student.grad.dtype == torch.bfloat16 and student.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_gradient_reaches_the_students_logits_alone(name):
    student, teacher, labels = batch()
    everything = Outputs(
        logits=student.requires_grad_(),
        last_map=torch.randn(6, 3, 2, 2, requires_grad=True),
        maps={"stage1": torch.randn(6, 3, 4, 4, requires_grad=True)},
        projected=torch.randn(6, 7, 2, 2, requires_grad=True),
    )
    objective = Objective(row(name.partition(",")[0], **CASES[name]))
    values = objective(everything, of_teacher(teacher), labels, torch.tensor(0.0))
    values["loss"].backward()
    assert list(objective.parameters()) == []
    assert student.grad.abs().sum(1).min() > 0
    assert everything.last_map.grad is None and everything.projected.grad is None
    assert everything.maps["stage1"].grad is None


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_weighs_every_loss(name):
    student, teacher, labels = batch()
    objective = Objective(row(name.partition(",")[0], **CASES[name]))
    soft = value_of(name.partition(",")[0], student, teacher, labels, **CASES[name])
    hard = losses.cross_entropy(Outputs(logits=student), labels)
    for schedule in losses.ALPHA_SCHEDULES:
        alpha = losses.alpha_schedule(schedule, 3, 4)[1, 2]
        values = objective(Outputs(logits=student), of_teacher(teacher), labels, alpha)
        torch.testing.assert_close(values["loss"], alpha * hard + (1 - alpha) * soft)
