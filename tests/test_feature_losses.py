"""The feature losses against figures worked out element by element with numpy in float64, and their numerics."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
import models
from losses import LOSSES, Objective
from outputs import Outputs, Shapes
from recipes import Recipe
from util.runtime import UserError

B, N, CLASSES = 4, 9, 3
STUDENT = {"stage1": (2, 8, 8), "stage2": (3, 4, 4), "stage3": (4, 2, 2)}
TEACHER = {"stage1": (3, 4, 4), "stage2": (5, 4, 4), "stage3": (6, 4, 4)}
INDEX, LABELS = torch.tensor([7, 2, 0, 5]), torch.tensor([0, 1, 0, 2])
FEATURES = [name for name, loss in LOSSES.items() if callable(loss.needs) or {*loss.needs} - {"logits", "prototypes"}]


def shapes(maps):
    return Shapes(CLASSES, maps["stage3"], maps, N)


def network_outputs(maps, seed, images=B):
    """A network's outputs as after a ReLU."""
    rng = np.random.default_rng(seed)
    made = {k: torch.tensor(rng.normal(size=(images, *s)).clip(0), dtype=torch.float32) for k, s in maps.items()}
    return Outputs(None, made["stage3"], made, index=INDEX[:images])


def settings(name, **changed):
    return {key: setting.default for key, setting in LOSSES[name].settings.items()} | changed


def parts(name, student=STUDENT, teacher=TEACHER, **changed):
    """The loss's parts as an argument, where it has some."""
    torch.manual_seed(1)
    loss = LOSSES[name]
    return {"parts": loss.parts(shapes(student), shapes(teacher), **settings(name, **changed))} if loss.parts else {}


def value(name, student, teacher, labels=LABELS, named=None, **changed):
    named = parts(name, **changed) if named is None else named
    return LOSSES[name].function(student, teacher, labels, **settings(name, **changed), **named)


def leaves(outputs):
    """The outputs with a gradient, and a projected map."""
    maps = {name: tensor.clone().requires_grad_() for name, tensor in outputs.maps.items()}
    projected = maps["stage3"].repeat(1, 2, 1, 1)[:, : TEACHER["stage3"][0]].detach().requires_grad_()
    return outputs._replace(maps=maps, last_map=maps["stage3"], projected=projected)


S, T = network_outputs(STUDENT, 0), network_outputs(TEACHER, 1)


def array(tensor):
    return tensor.detach().double().numpy()


def pool(maps, side):
    """(B, C, H, W) averaged over blocks down to side x side."""
    n = maps.shape[2] // side
    return maps.reshape(*maps.shape[:2], side, n, side, n).mean((3, 5))


def stage_pairs():
    for name in STUDENT:
        s, t = array(S.maps[name]), array(T.maps[name])
        side = min(s.shape[2], t.shape[2])
        yield pool(s, side), pool(t, side)


def conv1x1(conv, maps):
    result = np.einsum("oi,bihw->bohw", array(conv.weight)[:, :, 0, 0], maps)
    return result if conv.bias is None else result + array(conv.bias)[:, None, None]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fitnet(stage):
    named = parts("fitnet", stage=stage)
    s, t = list(stage_pairs())[stage - 1]
    conv = named["parts"][0]
    expected = ((np.maximum(batch_norm(conv1x1(conv, s)), 0) - t) ** 2).mean()
    assert value("fitnet", S, T, named=named, stage=stage).item() == pytest.approx(expected, rel=1e-5)


def test_at():
    expected = 0
    for pair in stage_pairs():
        images, side = len(pair[0]), pair[0].shape[2]
        for b in range(images):
            q_s, q_t = ([[(m[b, :, y, x] ** 2).mean() for x in range(side)] for y in range(side)] for m in pair)
            difference = q_s / np.linalg.norm(q_s) - q_t / np.linalg.norm(q_t)
            expected += (difference**2).sum() / images / side**2
    assert value("at", S, T).item() == pytest.approx(expected, rel=1e-5)


def test_sp():
    rows = []
    for maps in (array(S.last_map), array(T.last_map)):
        G = np.array([[(maps[i] * maps[j]).sum() for j in range(B)] for i in range(B)])
        rows.append([row / sqrt((row**2).sum()) for row in G])
    expected = sum((rows[0][i][j] - rows[1][i][j]) ** 2 for i in range(B) for j in range(B)) / B**2
    assert value("sp", S, T).item() == pytest.approx(expected, rel=1e-5)


def huber(v):
    return v * v / 2 if abs(v) <= 1 else abs(v) - 0.5


def cosine(a, b):
    return a @ b / sqrt(a @ a * (b @ b)) if a.any() and b.any() else 0.0


def np_rkd(x, y, weights):
    images = range(len(x))
    pairs = [(i, j) for i in images for j in images]
    scales = [np.mean([d for d in (np.linalg.norm(z[i] - z[j]) for i, j in pairs) if d > 0]) for z in (x, y)]
    distance, angle = 0, 0
    for i, j in pairs:
        v = np.linalg.norm(x[i] - x[j]) / scales[0] - np.linalg.norm(y[i] - y[j]) / scales[1]
        distance += huber(v) / len(x) ** 2
        for k in images:
            angle += huber(cosine(x[i] - x[j], x[k] - x[j]) - cosine(y[i] - y[j], y[k] - y[j])) / len(x) ** 3
    return weights[0] * distance + weights[1] * angle


@pytest.mark.parametrize("weights", [(25, 50), (1, 0), (0, 1)])
def test_rkd(weights):
    x, y = (array(outputs.last_map).mean((2, 3)) for outputs in (S, T))
    y[2] *= 9  # an outlier, where the Huber loss is linear
    teacher = T._replace(last_map=torch.tensor(y, dtype=torch.float32)[:, :, None, None])
    found = value("rkd", S, teacher, distance_weight=weights[0], angle_weight=weights[1])
    assert found.item() == pytest.approx(np_rkd(x, y, weights), rel=1e-4)
    assert settings("rkd") == {"distance_weight": 25, "angle_weight": 50}


def test_rkd_of_images_that_are_nearly_or_quite_the_same():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 50)).astype(np.float32), rng.normal(size=(5, 60)).astype(np.float32)
    x[1:3] = x[0] + 1e-4 * rng.normal(size=(2, 50))
    x[4] = x[3]
    student, teacher = (Outputs(last_map=torch.tensor(z)[:, :, None, None].requires_grad_()) for z in (x, y))
    found = value("rkd", student, teacher)
    assert found.item() == pytest.approx(np_rkd(x.astype(float), y.astype(float), (25, 50)), rel=1e-3)
    slope = torch.autograd.grad(found, student.last_map)[0].squeeze()
    assert slope.isfinite().all() and slope[3].abs().max() < 10 and slope[4].abs().max() < 10


def test_rkd_in_parts_has_the_gradient_of_the_whole():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(140, 3, generator=rng).requires_grad_(), torch.randn(140, 5, generator=rng)
    e_x, e_y = (F.normalize(z - z[:, None], dim=2, eps=1e-12) for z in (x, y))  # of all pairs, (B, B, C)
    whole = F.smooth_l1_loss(e_x @ e_x.mT, e_y @ e_y.mT)
    expected = torch.autograd.grad(whole, x)[0]
    student, teacher = (Outputs(last_map=z[:, :, None, None]) for z in (x, y))
    found = value("rkd", student, teacher, distance_weight=0, angle_weight=1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], expected, rtol=1e-3, atol=1e-8)


def test_pkt():
    probabilities = []
    for maps in (S.last_map, T.last_map):
        x = array(maps).mean((2, 3))
        K = np.array([[(cosine(x[i], x[j]) + 1) / 2 for j in range(B)] for i in range(B)])
        probabilities.append(K / K.sum(1, keepdims=True))
    s, t = probabilities
    expected = sum(t[i, j] * log((t[i, j] + 1e-7) / (s[i, j] + 1e-7)) for i in range(B) for j in range(B)) / B**2
    assert value("pkt", S, T).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("changed", [{}, {"init_variance": 0.5, "eps": 0.1}, {"init_variance": 800.0}])
def test_vid(changed):
    named, expected = parts("vid", **changed), 0
    variance = settings("vid", **changed)["init_variance"]  # all variances are, at the start
    for (s, t), stage in zip(stage_pairs(), named["parts"], strict=True):
        for k, layer in enumerate(stage.mean):
            s = conv1x1(layer, s) if k % 2 == 0 else s.clip(0)
        expected += np.mean((t - s) ** 2 / variance + log(variance)) / 2
    assert value("vid", S, T, named=named, **changed).item() == pytest.approx(expected, rel=1e-5)


def test_vid_has_a_variance_for_each_channel():
    named = parts("vid")
    with torch.no_grad():
        for stage in named["parts"]:
            stage.scale.copy_(torch.arange(len(stage.scale)))
            for layer in stage.mean[::2]:
                layer.weight.zero_()
    expected = 0
    for _, t in stage_pairs():
        v = np.log1p(np.exp(np.arange(t.shape[1])))[:, None, None] + 1e-5
        expected += np.mean(t**2 / v + np.log(v)) / 2
    assert value("vid", S, T, named=named).item() == pytest.approx(expected, rel=1e-5)


def np_crd(banks, embedded, known, drawn, negatives, z, temperature):
    """CRD, image by image and negative by negative; sets z, the constants, where they are None."""
    M, total = len(known), 0
    for side in (0, 1):
        anchor, bank = embedded[side], banks[1 - side]
        use = [[j for j in drawn if known[j] != label] for label in LABELS.tolist()]
        p = [[exp(anchor[b] @ bank[j] / temperature) for j in [INDEX[b], *use[b]]] for b in range(B)]
        if z[side] is None:
            z[side] = M * np.mean([x for row in p for x in row])
        h = [[x / z[side] / (x / z[side] + negatives / M) for x in row] for row in p]
        for told, *others in h:
            total -= (log(told) + negatives * np.mean([log(1 - x) for x in others])) / B
    return total


@pytest.mark.parametrize("changed", [{"negatives": 5}, {"negatives": 100, "T": 0.5, "bank_momentum": 0.9}])
def test_crd_over_two_steps(changed):
    changed = {"dimension": 3, "T": 0.07, "bank_momentum": 0.5} | changed
    named = parts("crd", **changed)
    module, momentum, k = named["parts"], changed["bank_momentum"], changed["negatives"]
    assert module.bank_student.abs().max() <= 1 and module.bank_student.std() > 0.3  # uniform within sqrt(3 / 3)
    banks, known, z = [array(module.bank_student), array(module.bank_teacher)], np.full(N, -1), [None, None]
    for step in range(2):
        student, teacher = network_outputs(STUDENT, 10 + step), network_outputs(TEACHER, 20 + step)
        embedded = []
        for outputs, linear in ((student, module.embed_student), (teacher, module.embed_teacher)):
            e = array(outputs.last_map).mean((2, 3)) @ array(linear.weight).T + array(linear.bias)
            embedded.append(e / np.linalg.norm(e, axis=1, keepdims=True))
        torch.manual_seed(step)
        drawn = torch.randperm(N)[:k].tolist()
        known[INDEX] = LABELS
        expected = np_crd(banks, embedded, known, drawn, k, z, changed["T"])
        torch.manual_seed(step)
        module.draw()
        assert value("crd", student, teacher, named=named, **changed).item() == pytest.approx(expected, rel=1e-4)
        for bank, new in zip(banks, embedded, strict=True):
            mixed = momentum * bank[INDEX] + (1 - momentum) * new
            bank[INDEX] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        np.testing.assert_allclose(array(module.bank_student), banks[0], atol=1e-5)
        np.testing.assert_allclose(array(module.bank_teacher), banks[1], atol=1e-5)


def test_crd_without_any_image_of_another_class():
    named = parts("crd")
    named["parts"].labels.zero_()
    check_finite("crd", S, T, LABELS * 0, named)


def test_crd_stands_a_temperature_at_which_exp_overflows():
    assert value("crd", S, T, T=1e-3).isfinite()


def batch_norm(x):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5)


def conv3x3(conv, maps):
    padded, side = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1))), maps.shape[2]
    weight = array(conv.weight)
    return sum(
        np.einsum("oi,bihw->bohw", weight[:, :, y, x], padded[:, :, y : y + side, x : x + side])
        for y in range(3)
        for x in range(3)
    )


def nearest(maps, side):
    at = [i * maps.shape[2] // side for i in range(side)]
    return maps[:, :, at][:, :, :, at]


def test_reviewkd():
    named, expected, deeper = parts("reviewkd"), 0, None
    levels = [(array(S.maps[name]), array(T.maps[name])) for name in STUDENT]
    levels.append(tuple(array(outputs.last_map).mean((2, 3), keepdims=True) for outputs in (S, T)))
    for (s, t), fusion in reversed(list(zip(levels, named["parts"].fusions, strict=True))):
        x, side = batch_norm(conv1x1(fusion.narrow[0], s)), t.shape[2]
        if deeper is not None:
            y = nearest(deeper, x.shape[2])
            a = 1 / (1 + np.exp(-conv1x1(fusion.attention, np.concatenate([x, y], 1))))
            x = x * a[:, :1] + y * a[:, 1:]
        deeper = nearest(x, side)
        fused = batch_norm(conv3x3(fusion.widen[0], deeper))
        total, weight, weights = ((fused - t) ** 2).mean(), 1, 1
        for small in (4, 2, 1):
            if small < side:
                weight /= 2
                weights += weight
                total += weight * ((pool(fused, small) - pool(t, small)) ** 2).mean()
        expected += total / weights
    assert value("reviewkd", S, T, named=named).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_reach_the_student_and_the_parts_alone(name):
    student, teacher, named = leaves(S), leaves(T), parts(name)
    value(name, student, teacher, named=named).backward()
    seen = [x for x in [*student.maps.values(), student.projected] if x.grad is not None]
    assert seen and all(x.grad.isfinite().all() and x.grad.any() for x in seen)
    assert all(x.grad is None for x in teacher.maps.values())
    for module in named.values():
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), key


def check_finite(name, student, teacher, labels, named):
    student = leaves(student)
    found = value(name, student, teacher, labels, named=named)
    assert found.dtype == torch.float32 and found.shape == () and found.isfinite()
    found.backward()
    for tensor in [*student.maps.values(), student.projected, *(p for m in named.values() for p in m.parameters())]:
        assert tensor.grad is None or tensor.grad.isfinite().all()
    return found.item()


def scaled(outputs, factor):
    maps = {name: tensor * factor for name, tensor in outputs.maps.items()}
    return outputs._replace(maps=maps, last_map=maps["stage3"])


def first(outputs, images):
    maps = {name: tensor[:images] for name, tensor in outputs.maps.items()}
    return outputs._replace(maps=maps, last_map=maps["stage3"], index=outputs.index[:images])


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("name", FEATURES)
def test_short_batches(name, images):
    named, whole = parts(name), (S, leaves(T))
    value(name, leaves(S), whole[1], named=named)
    check_finite(name, first(S, images), first(T, images), LABELS[:images], named)


@pytest.mark.parametrize("factors", [(0, 1), (1, 0), (0, 0), (1e-12, 1), (1e4, 1e4)])
@pytest.mark.parametrize("name", FEATURES)
def test_maps_of_zeros_and_of_extremes(name, factors):
    check_finite(name, scaled(S, factors[0]), scaled(T, factors[1]), LABELS, parts(name))


@pytest.mark.parametrize("name", FEATURES)
def test_images_that_are_the_same(name):
    twice = torch.tensor([0, 0, 1, 1])
    student, teacher = (
        outputs._replace(maps={k: m[twice] for k, m in outputs.maps.items()}, last_map=outputs.last_map[twice])
        for outputs in (S, T)
    )
    check_finite(name, student, teacher, LABELS, parts(name))


@pytest.mark.parametrize("name", FEATURES)
def test_student_and_teacher_that_agree(name):
    twin = network_outputs(TEACHER, 1)
    found = check_finite(name, twin, T, LABELS, parts(name, student=TEACHER))
    if name in ("mse", "at", "sp", "rkd", "pkt"):
        assert abs(found) < 1e-6


@pytest.mark.parametrize("name", FEATURES)
def test_two_classes(name):
    check_finite(name, S, T, LABELS % 2, parts(name))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEATURES)
def test_half_precision_maps_and_autocast_give_float32(name, kind):
    halves = []
    for outputs in (leaves(S), leaves(T)):
        maps = {key: tensor.to(kind) for key, tensor in outputs.maps.items()}
        projected = outputs.projected.to(kind)
        halves.append(outputs._replace(maps=maps, last_map=maps["stage3"], projected=projected))
    torch.manual_seed(2)
    found = value(name, *halves)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        under = value(name, *halves)
    assert found.dtype == under.dtype == torch.float32
    assert under.item() == pytest.approx(found.item(), rel=1e-6 if not {"parts"} & {*parts(name)} else 0.1)


@pytest.mark.parametrize("name", FEATURES)
def test_resumed_parts_give_the_same_losses(name):
    def step(named, seed):
        student, teacher = leaves(network_outputs(STUDENT, seed)), leaves(network_outputs(TEACHER, seed + 1))
        return value(name, student, teacher, named=named).item()

    named = parts(name)
    step(named, 30)
    kept = {key: {k: v.clone() for k, v in module.state_dict().items()} for key, module in named.items()}
    random = torch.get_rng_state()
    expected = [step(named, seed) for seed in (40, 50)]
    resumed = parts(name)
    for key, module in resumed.items():
        module.load_state_dict(kept[key])
    torch.set_rng_state(random)
    assert [step(resumed, seed) for seed in (40, 50)] == expected


@pytest.mark.parametrize("name", ["at", "vid", "reviewkd"])
def test_networks_with_other_stages_are_refused(name):
    shallow = {key: TEACHER[key] for key in ("stage1", "stage2")}
    shallow_outputs = T._replace(maps={key: T.maps[key] for key in shallow})
    with pytest.raises(UserError, match="the student has 3 stages, the teacher 2; choose"):
        if LOSSES[name].parts:
            LOSSES[name].parts(shapes(STUDENT), Shapes(CLASSES, (6, 4, 4), shallow, N), **settings(name))
        value(name, S, shallow_outputs)


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--stage 4: the student has 3 stages only"):
        parts("fitnet", stage=4)


def test_a_variance_below_the_least_is_refused():
    with pytest.raises(UserError, match="--init_variance 0.1 must be above --eps 0.5"):
        parts("vid", init_variance=0.1, eps=0.5)


def recipe(name, **changed):
    return Recipe("job", "file", "student", 1, 1, soft=name, settings=changed)


def test_needs_follow_the_settings():
    assert losses.needs_of(recipe("fitnet")) == {"stage2"}
    assert losses.needs_of(recipe("fitnet", stage=3)) == {"stage3"}
    assert losses.needs_of(recipe("reviewkd")) == {"stages", "last_map"}


@pytest.mark.parametrize("name", FEATURES)
def test_a_loss_sees_no_more_of_the_teacher_than_it_needs(name):
    needs = losses.needs_of(recipe(name))
    maps = {key: tensor for key, tensor in T.maps.items() if {key, "stages"} & needs}
    # In an order of its own, as remembered outputs come.
    less = Outputs(None, T.last_map if "last_map" in needs else None, dict(reversed(maps.items())), index=INDEX)
    torch.manual_seed(0)
    found = value(name, leaves(S), less)
    torch.manual_seed(0)
    assert found.equal(value(name, leaves(S), T))


def test_objective_makes_the_parts_by_the_recipe_and_trains_them():
    objective = Objective(recipe("fitnet", stage=3), shapes(STUDENT), shapes(TEACHER))
    assert sum(p.numel() for p in objective.parameters()) == 4 * 6 + 6 + 2 * 6
    student = leaves(S)._replace(logits=torch.zeros(B, CLASSES))
    terms = objective(student, T, LABELS, torch.tensor(0.25))
    assert terms["loss"].item() == pytest.approx(0.25 * log(3) + 0.75 * terms["fitnet"].item(), rel=1e-6)
    terms["loss"].backward()
    assert all(p.grad.any() for p in objective.parameters())


def test_shapes_know_the_number_of_images():
    assert models.shapes(models.build("student", CLASSES), 8, 50).n_images == 50
