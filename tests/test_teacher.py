"""What the teacher remembers is what it would say, and never what another teacher said."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

import data
import jobs
import models
import teacher as teachers
from data import Batches, Split
from outputs import STAGES
from recipes import Recipe
from teacher import Teacher
from util.runtime import Runtime, UserError
from zoo import library_models

CPU = torch.device("cpu")
LOGITS, BOTH = frozenset({"logits"}), frozenset({"logits", "last_map"})
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture(scope="module")
def network(scaled_like_trained):
    torch.manual_seed(1)
    return scaled_like_trained(models.build("teacher", 10))


@pytest.fixture
def make(network, tmp_path):
    """A teacher with a cache in a folder of its own; "sha" stands for its weights."""

    def teacher(sha="sha", precision="fp32", **options):
        return Teacher(network, Runtime(CPU, precision), sha, 50.0, cache_dir=tmp_path / "cache", **options)

    return teacher


@pytest.fixture
def passes(monkeypatch):
    """How many batches the teacher was run on."""
    ran, call = [], Teacher.__call__

    def count(self, batch):
        ran.append(batch)
        return call(self, batch)

    monkeypatch.setattr(Teacher, "__call__", count)
    return ran


def batches_of(digits, n=40, batch_size=16, **options):
    split = Split(digits.train.images[:n], digits.train.labels[:n])
    return Batches(split, digits.mean, digits.std, batch_size, CPU, **{"shuffle": True, **options})


def same(given, expected, tolerance=1e-5):
    if given.logits is not None:
        torch.testing.assert_close(given.logits, expected.logits, rtol=tolerance, atol=tolerance)
    pairs = [(given.maps[name], expected.maps[name]) for name in given.maps]
    pairs += [(given.last_map, expected.last_map)] if given.last_map is not None else []
    for ours, theirs in pairs:
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert ours.shape == theirs.shape and difference < tolerance


def test_the_same_weights_with_another_stem_are_another_teacher(digits, tmp_path):
    """Where strides are all that stems differ by, one file fits both."""
    small, standard = (
        Teacher(
            models.build("mobilenet_v2", 10, stem), Runtime(CPU, "fp32"), "sha", 50.0, cache_dir=tmp_path, stem=stem
        )
        for stem in ("small", "standard")
    )
    batches = batches_of(digits)
    assert small.cache_key(batches) != standard.cache_key(batches) and small.identity != standard.identity


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    "needs", [LOGITS, BOTH, frozenset({"logits", "stage1", "stage3"}), frozenset({"stages"})], ids=sorted
)
def test_remembered_outputs_are_the_live_ones(digits, make, precision, needs):
    teacher, batches = make(precision=precision), batches_of(digits)
    source = teacher.source(batches, needs)
    assert source is not teacher
    for epoch in (0, 1):
        for batch in batches.epoch(epoch):
            given = source(batch)
            assert (given.last_map is not None) == ("last_map" in needs) and given.index.equal(batch.index)
            assert set(given.maps) == (set(STAGES) if "stages" in needs else needs - BOTH)
            same(given, teacher(batch), TOLERANCES[precision])


def test_the_head_is_the_teachers(digits, make, network):
    batches = batches_of(digits)
    source = make().source(batches, BOTH)
    outputs = source(next(batches.epoch(0)))
    torch.testing.assert_close(outputs.head(outputs.last_map), outputs.logits, rtol=1e-4, atol=1e-4)


def test_one_pass_serves_all_rows_and_seeds(digits, make, passes):
    teacher = make(needs=BOTH)
    for seed in (0, 1):
        for needs in (LOGITS, BOTH):
            batches = batches_of(digits, seed=seed)
            for batch in batches.epoch(0):
                teacher.source(batches, needs)(batch)
    assert len(passes) == 1  # 40 images are one batch of the pass


def test_maps_can_be_asked_for_later(digits, make, passes):
    teacher, batches = make(), batches_of(digits)
    teacher.source(batches, LOGITS)
    teacher.source(batches, BOTH)
    assert len(passes) == 2


def test_outputs_outlive_the_process(digits, make, passes):
    batches = batches_of(digits)
    make().source(batches, BOTH)
    source = make().source(batches, BOTH)
    assert len(passes) == 1
    batch = next(batches.epoch(0))
    same(source(batch), make()(batch))


@pytest.mark.parametrize("change", ["weights", "precision", "images", "mean", "fewer"])
def test_a_change_is_noticed(digits, make, passes, tmp_path, change):
    make().source(batches_of(digits), BOTH)
    n = len(passes)
    teacher, batches = make(), batches_of(digits)
    if change == "weights":
        teacher = make(sha="another")
    elif change == "precision":
        teacher = make(precision="bf16")
    elif change == "images":
        images = batches.split.images.clone()
        images[3, 2, 2, 0] ^= 1
        batches = Batches(Split(images, batches.split.labels), digits.mean, digits.std, 16, CPU, shuffle=True)
    elif change == "mean":
        batches.mean = batches.mean + 0.01
    else:
        batches = batches_of(digits, n=39)
    source = teacher.source(batches, BOTH)
    assert len(passes) == n + 1
    batch = next(batches.epoch(0))
    same(source(batch), teacher(batch), TOLERANCES[teacher.runtime.precision])
    assert len(os.listdir(tmp_path / "cache")) == 2  # the files of before made room


def damaged(path, content, damage):
    """The file's content after that damage."""
    if damage == "of another":  # of the same form
        other = path.with_name(path.name.replace("stage4", "last_map"))
        return other.read_bytes() if other != path else content[:-1]
    header, seal = content[:128], content[-teachers.SEAL_SIZE :]
    return {
        "cut short": content[:-1],
        "empty": b"",
        "garbage": b"garbage" * 100,
        "pickle": b"\x80\x02N.",
        "zeros": header + bytes(len(content) - 128),
        "zeros before the seal": header + bytes(len(content) - 128 - len(seal)) + seal,
        "a bit": content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
        "columns first": content.replace(b"'fortran_order': False", b"'fortran_order': True "),
        "integers": content.replace(b"<f4", b"<i4"),
        "as written before": content[: -teachers.SEAL_SIZE],
    }[damage]


DAMAGES = ["cut short", "empty", "garbage", "pickle", "zeros", "zeros before the seal", "a bit", "columns first",
           "integers", "of another", "as written before"]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(digits, make, passes, tmp_path, capfd, damage):
    batches = batches_of(digits)
    needs = BOTH | {"stage4"}
    make().source(batches, needs)
    contents = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for path, content in contents.items():
        path.write_bytes(damaged(path, content, damage))
    source = make().source(batches, needs)
    assert len(passes) == 2 and capfd.readouterr().err.count("is damaged: the teacher's outputs in it are") >= 2
    batch = next(batches.epoch(0))
    same(source(batch), make()(batch)._replace(maps={"stage4": make()(batch).maps["stage4"]}))
    make().source(batches, needs)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == contents and len(passes) == 4


def test_an_interrupted_pass_leaves_nothing(digits, make, monkeypatch, tmp_path):
    def interrupt(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Teacher, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make().source(batches_of(digits), BOTH)
    assert os.listdir(tmp_path / "cache") == []


def test_without_room_the_teacher_is_run_live(digits, make, monkeypatch, capfd):
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda folder: full)
    teacher = make()
    assert teacher.source(batches_of(digits), BOTH) is teacher
    lines = capfd.readouterr().err.splitlines()
    assert ["logits and last map" in line for line in lines] == [True, False]  # all; then the logits alone
    assert all("has no room" in line for line in lines)
    assert teacher.source(batches_of(digits), LOGITS) is teacher
    assert capfd.readouterr().err == ""  # tried once, and told once


def test_of_maps_too_large_for_half_precision_the_logits_are_kept(digits, make, passes, monkeypatch, capfd, tmp_path):
    call = Teacher.__call__

    def huge(self, batch):
        outputs = call(self, batch)
        return outputs._replace(last_map=outputs.last_map * 1e9)

    monkeypatch.setattr(Teacher, "__call__", huge)
    teacher, batches = make(precision="bf16"), batches_of(digits)
    assert teacher.source(batches, BOTH) is teacher
    assert "last map are too large for float16" in capfd.readouterr().err
    assert [path.name.split("_")[1] for path in (tmp_path / "cache").glob("*.npy")] == ["logits.npy"]
    n = len(passes)
    source, batch = teacher.source(batches, LOGITS), next(batches.epoch(0))
    same(source(batch), teacher(batch), TOLERANCES["bf16"])
    assert teacher.source(batches, BOTH) is teacher
    assert len(passes) == n + 1  # none but the one that this test compares with


def test_where_maps_asked_for_later_cannot_be_kept_the_logits_stay(digits, make, monkeypatch, capfd):
    teacher, batches = make(), batches_of(digits)
    teacher.source(batches, LOGITS)
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    assert teacher.source(batches, BOTH) is teacher
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert teacher.source(batches, LOGITS) is not teacher


def test_other_images_are_answered_for_themselves(digits, make):
    """Not with what is remembered of the training images."""
    teacher = make()
    teacher.source(batches_of(digits), BOTH)
    split = Split(digits.test.images[:40], digits.test.labels[:40])
    others = Batches(split, digits.mean, digits.std, 16, CPU)
    for options in ({}, {"augment": True}):
        others = Batches(split, digits.mean, digits.std, 16, CPU, **options)
        batch = next(others.epoch(0))
        same(teacher.source(others, LOGITS)(batch), teacher(batch)._replace(last_map=None, maps={}))


def test_wild_maps_are_told_of(digits, make, monkeypatch, capfd):
    call = Teacher.__call__

    def wild(self, batch):
        outputs = call(self, batch)
        outputs.last_map[batch.index == 7] *= 100
        return outputs

    teacher, batches = make(needs=BOTH), batches_of(digits)
    teacher.source(batches, BOTH)
    assert capfd.readouterr().err == ""  # this one is not
    monkeypatch.setattr(Teacher, "__call__", wild)
    make("another").source(batches, BOTH)
    assert "1 of 40 images huge feature maps" in capfd.readouterr().err


def test_a_teacher_is_shown_images_as_it_wants_them(digits, network, make, tmp_path):
    wanted = (0.1, 0.2, 0.3), (0.5, 0.4, 0.6)
    batches = batches_of(digits)
    teacher = make(shown=(digits.mean, digits.std), normalisation=wanted)
    batch = next(batches.epoch(0))
    plain = Batches(batches.split, *wanted, 16, CPU, shuffle=True)
    expected = make()(next(plain.epoch(0)))
    same(teacher(batch), expected, 1e-4)
    same(teacher.source(batches, BOTH)(batch), expected, 1e-4)
    same(make().source(batches, BOTH)(batch), make()(batch))  # whose cache is another


def test_a_cache_turned_off_is_off(digits, network):
    teacher = Teacher(network, Runtime(CPU, "fp32"), "sha", 50.0)
    assert teacher.source(batches_of(digits), BOTH) is teacher
    assert teacher.source(batches_of(digits, augment=True), LOGITS) is teacher


# views


@pytest.mark.parametrize("precision", TOLERANCES)
def test_views_are_the_live_outputs(digits, make, precision):
    teacher, batches = make(precision=precision), batches_of(digits, augment=True)
    source = teacher.source(batches, LOGITS)
    assert source is not teacher
    for epoch in (0, 3):
        for batch in batches.epoch(epoch):
            same(source(batch), teacher(batch), TOLERANCES[precision])


def test_a_view_is_computed_once(digits, make, passes):
    teacher = make()
    for _ in range(3):  # three rows of the same seed see the same views
        batches = batches_of(digits, augment=True)
        source = teacher.source(batches, LOGITS)
        for epoch in range(2):
            for batch in batches.epoch(epoch):
                source(batch)
    seen = sum(len(batch.labels) for batch in passes)
    assert 70 < seen <= 80  # two epochs of 40 images, but for views that came up twice


def run_two_epochs(teacher, batches):
    source = teacher.source(batches, LOGITS)
    return [source(batch).logits for epoch in range(2) for batch in batches.epoch(epoch)]


@pytest.mark.parametrize("precision", TOLERANCES)
def test_views_outlive_the_process(digits, make, passes, precision):
    batches = batches_of(digits, augment=True)
    expected = run_two_epochs(make(precision=precision), batches)
    n = len(passes)
    given = run_two_epochs(make(precision=precision), batches)
    assert len(passes) == n and torch.cat(given).equal(torch.cat(expected))


def test_views_of_a_run_beside_this_one_are_taken(digits, make, passes):
    batches, other = batches_of(digits, augment=True), batches_of(digits, augment=True)
    source = make().source(batches, LOGITS)
    first = next(batches.epoch(0))
    source(first)
    run_two_epochs(make(), other)
    n = len(passes)
    same(source(next(batches.epoch(1))), make()(next(batches.epoch(1)))._replace(last_map=None, maps={}))
    assert len(passes) == n + 1  # the one that this test compares with


@pytest.mark.parametrize("change", ["weights", "precision", "mean"])
def test_views_of_another_teacher_are_not_taken(digits, make, tmp_path, change):
    batches = batches_of(digits, augment=True)
    run_two_epochs(make(), batches)
    before = set((tmp_path / "cache").iterdir())
    teacher = make(
        sha="another" if change == "weights" else "sha", precision="bf16" if change == "precision" else "fp32"
    )
    if change == "mean":
        batches.mean = batches.mean + 0.01
    expected = [teacher(batch).logits for epoch in range(2) for batch in batches.epoch(epoch)]
    given = run_two_epochs(teacher, batches)
    tolerance = TOLERANCES[teacher.runtime.precision]
    torch.testing.assert_close(torch.cat(given), torch.cat(expected).float(), rtol=tolerance, atol=tolerance)
    assert before.isdisjoint((tmp_path / "cache").iterdir())  # the files of before made room


def rewritten(path, **changed):
    """The bytes of a sound file like the one at path, with other arrays."""
    with np.load(path) as arrays:
        kept = {**arrays, **changed}
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in kept.items() if array is not None})
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        "cut short", "empty", "garbage", "a bit", "pickle", "an array alone", "compressed", "encrypted",
        {"key": None}, {"key": np.array("another")}, {"views": None}, {"views": np.array([-1])},
        {"views": np.array([10**9])}, {"views": np.zeros((3, 3), np.int64)}, {"logits": np.zeros(7)},
        {"logits": np.full((40, 10), np.nan, np.float32)},
    ],
    ids=lambda damage: damage if isinstance(damage, str) else f"other {'and'.join(damage)}",
)  # fmt: skip
def test_a_damaged_file_of_views_is_made_anew(digits, make, passes, tmp_path, capfd, damage):
    batches = batches_of(digits, augment=True)
    expected = run_two_epochs(make(), batches)
    n = len(passes)
    paths = [*(tmp_path / "cache").iterdir()]
    for path in paths:
        content = bytearray(path.read_bytes())
        member = content.rindex(b"PK\x01\x02")  # of the directory of members
        if isinstance(damage, dict):
            content = rewritten(path, **damage)
        elif damage == "an array alone":
            np.save(file := io.BytesIO(), np.zeros(3))
            content = file.getvalue()
        elif damage in ("cut short", "empty", "garbage", "pickle"):
            content = damaged(path, bytes(content), damage)
        else:
            content[{"a bit": len(content) // 2, "compressed": member + 10, "encrypted": member + 8}[damage]] ^= 1
        path.write_bytes(content)
    given = run_two_epochs(make(), batches)
    assert len(passes) == 2 * n and torch.cat(given).equal(torch.cat(expected))
    assert capfd.readouterr().err.count("is damaged: the teacher's outputs in it are computed anew") == len(paths)
    assert torch.cat(run_two_epochs(make(), batches)).equal(torch.cat(expected)) and len(passes) == 2 * n
    assert capfd.readouterr().err == ""


def test_views_that_cannot_be_kept_are_told_of_once(digits, make, monkeypatch, capfd, tmp_path):
    batches = batches_of(digits, augment=True)
    expected = run_two_epochs(make(), batches)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    given = run_two_epochs(make(), batches)
    assert torch.cat(given).equal(torch.cat(expected)) and not [*(tmp_path / "cache").iterdir()]
    assert ["not kept for other runs" in line for line in capfd.readouterr().err.splitlines()] == [True]


def test_logits_too_large_for_the_table_are_live(digits, make, capfd, tmp_path):
    teacher, batches = make(precision="bf16"), batches_of(digits, augment=True)
    with torch.no_grad():
        teacher.network.fc.weight.mul_(1e7)
    given = run_two_epochs(teacher, batches)
    expected = [teacher(batch).logits for epoch in range(2) for batch in batches.epoch(epoch)]
    assert torch.cat(given).equal(torch.cat(expected)) and torch.cat(given).abs().max() > 1e5
    assert capfd.readouterr().err.count("too large for half precision") == 1 and not [*tmp_path.rglob("*.npz")]


def test_maps_of_views_are_live(digits, make):
    teacher = make()
    assert teacher.source(batches_of(digits, augment=True), BOTH) is teacher


def test_views_of_large_images_are_live(make):
    split = Split(torch.zeros(2, 65, 65, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    batches = Batches(split, (0, 0, 0), (1, 1, 1), 2, CPU, augment=True)
    teacher = make()
    assert teacher.source(batches, LOGITS) is teacher


def test_views_that_do_not_fit_are_live(digits, make, monkeypatch):
    monkeypatch.setattr(teachers, "free_memory", lambda device: 1000)
    teacher = make()
    assert teacher.source(batches_of(digits, augment=True), LOGITS) is teacher


def test_view_codes_tell_views_apart(digits):
    batches = batches_of(digits, n=1500, augment=True)
    views, codes = batches.views(0), batches.view_codes(0)
    assert codes.min() >= 0 and codes.max() < data.VIEWS
    assert len({tuple(view) for view in views.tolist()}) == len(codes.unique())


def test_batches_filled_up():
    assert teachers._filled_up(torch.tensor([4, 7, 9]), 5).tolist() == [4, 7, 9, 4, 4]
    assert teachers._filled_up(torch.tensor([4, 7]), 2).tolist() == [4, 7]


# networks and losses

OF_MAPS = ["mse", "s2t", "simkd", "fitnet", "at", "sp", "reviewkd"]
# Of each teacher its stem, the images' side, a student for them, and the losses that the pair can't have.
TEACHERS = {
    "resnet20": ("small", 16, "resnet20", []),
    "resnet18": ("standard", 32, "resnet20", ["at", "reviewkd"]),
    "mobilenet_v3_small": ("small", 16, "resnet20", ["simkd", "at", "reviewkd"]),
    "timm:test_resnet": ("standard", 64, "resnet20", ["simkd", "at", "reviewkd"]),
    "vit_b_32": ("standard", 224, "mobilenet_v3_small", OF_MAPS),
    "timm:test_vit": ("standard", 160, "timm:test_vit", OF_MAPS),
}


def tiny_vit(name, num_classes):
    """A network of vit_b_32's class that takes little time."""
    return torchvision.models.VisionTransformer(224, 32, 1, 1, 8, 8, num_classes=num_classes)


@pytest.mark.parametrize("name", TEACHERS)
def test_any_teacher_gives_a_loss_the_same_from_the_cache_and_live_or_is_refused(name, tmp_path, monkeypatch, capfd):
    stem, side, student, unsuited = TEACHERS[name]
    if name == "vit_b_32":
        monkeypatch.setattr(library_models, "_traces", {})
        monkeypatch.setattr(torchvision.models, "get_model", tiny_vit)
    torch.manual_seed(0)
    network = models.build(name, 3, stem).eval()
    images = torch.randint(256, (6, side, side, 3), dtype=torch.uint8)
    batches = Batches(Split(images, torch.arange(6) % 3), (0.5,) * 3, (0.5,) * 3, 6, CPU)
    batch, needs, refused = next(batches.epoch(0)), frozenset({"logits", "last_map", "stages"}), []
    teacher = Teacher(network, Runtime(CPU, "fp32"), "sha", 50.0, cache_dir=tmp_path, needs=needs)
    with torch.no_grad():
        for loss in ("kd", "wkd_l", *OF_MAPS):
            recipe = Recipe(loss, loss, "feature_student" if loss == "mse" else "student", 1, 1, alpha=0.5)
            recipe = replace(recipe, soft=None, gamma=1.0) if loss == "s2t" else replace(recipe, soft=loss)
            recipe = replace(recipe, arch=f"{student}+{name}" if loss == "simkd" else student)
            try:
                net = models.build(recipe.arch, 3, models.stem_of(student, "auto", side))
                source, objective = jobs.aim(recipe, net.eval(), teacher, batches)
            except UserError as error:
                assert "\n" not in str(error)
                refused.append(loss)
                continue
            assert source is not teacher
            outputs = net(batch.images)
            found = [objective(outputs, of(batch), batch.labels, torch.tensor(0.5))["loss"] for of in (source, teacher)]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert refused == unsuited and "not kept" not in capfd.readouterr().err
