"""Networks other than the rows' own: every loss on every kind of pair, and the flags that choose them."""

import argparse
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import cli
import jobs
import losses
import models
from data import Dataset, Split
from recipes import RECIPES, Recipe
from util.runtime import UserError

PAIRS = [  # teacher and student, of all families; the first are of three stages, the VGGs and ResNet-18 of four
    ("resnet32", "resnet20"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn_40_1", "mobilenetv2"),
    ("vgg13", "vgg8"),
    ("resnet8x4", "shufflenetv1"),
    ("resnet20", "resnet18"),
    ("vgg8", "wrn_16_2"),
]
STAGEWISE = {"at", "vid", "reviewkd"}
SIDE = 8


def refused(ran, *words):
    error = ran.err.splitlines()[-1]
    assert ran.code == 2 and ": error: " in error and all(word in error for word in words), ran.err


@cache
def network(name):
    torch.manual_seed(0)
    return models.build(name, 5)


@cache
def taught(name):
    """A teacher's outputs for four images, as engine.fit gets them."""
    teacher = models.folded(network(name))
    with torch.no_grad():
        own = {"head": teacher.classify, "prototypes": models.prototypes(teacher)}
        return teacher(images())._replace(**own, index=torch.tensor([6, 1, 4, 0]))


def images():
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=lambda name: name)
def test_every_loss_trains_every_pair(loss, teacher, student):
    """Its gradient reaches the student and all that it learns, and steps leave all finite; else it is refused."""
    learns = f"{student}+{teacher}" if losses.LOSSES[loss].reuses else student
    pair = [models.shapes(network(name), SIDE, 10) for name in (learns, teacher)]
    settings = {"negatives": 4, "dimension": 8} if loss == "crd" else {}
    recipe = Recipe("row", "row", "student", 1, 1, soft=loss, alpha=0.0, settings=settings)
    torch.manual_seed(2)
    learner, labels = models.build(learns, 5), torch.tensor([0, 3, 1, 3])
    if loss in STAGEWISE and len(pair[0].maps) != len(pair[1].maps):
        with pytest.raises(UserError, match="stages"):
            losses.Objective(recipe, *pair)(learner(images()), taught(teacher), labels, torch.tensor(0.0))
        return
    trained = torch.nn.ModuleDict({"learner": learner, "objective": losses.Objective(recipe, *pair)})
    optimiser = torch.optim.Adam(trained.parameters(), lr=1e-3)
    for _ in range(3):
        terms = trained["objective"](learner(images()), taught(teacher), labels, torch.tensor(0.0))
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
    assert terms["loss"].isfinite() and all(value.isfinite().all() for value in trained.parameters())
    reached = {name for name, value in trained.named_parameters() if value.grad is not None and value.grad.any()}
    assert reached & {f"learner.{name}" for name, value in learner.named_parameters() if value.ndim == 4}
    assert reached >= {f"objective.{name}" for name, _ in trained["objective"].named_parameters()}


def test_a_projector_for_any_pair():
    """What a feature student has for a ResNet-50, any student gets from the loss, in the shapes of the two networks."""
    student, teacher = network("resnet20"), taught("resnet32x4")
    pair = [models.shapes(network(name), SIDE, 10) for name in ("resnet20", "resnet32x4")]
    objective = losses.Objective(Recipe("row", "row", "student", 1, 1, soft="mse", alpha=0.0, gamma=0.5), *pair)
    assert objective.projector.weight.shape == (256, 64, 1, 1)
    outputs, labels = student(images()), torch.tensor([0, 3, 1, 3])
    terms = objective(outputs, teacher, labels, torch.tensor(0.0))
    projected = objective.projector(outputs.last_map)
    torch.testing.assert_close(terms["mse"], F.mse_loss(projected, teacher.last_map))
    torch.testing.assert_close(terms["s2t"], F.cross_entropy(teacher.head(projected), labels))
    own = models.shapes(network("feature_student"), SIDE, 1)
    recipe = Recipe("row", "row", "feature_student", 1, 1, soft="mse")
    assert losses.Objective(recipe, own, models.shapes(network("teacher"), SIDE, 1)).projector is None
    with pytest.raises(UserError, match="2048 channels, the teacher's map has 256; give --student_arch"):
        losses.Objective(recipe, own, pair[1])


def test_a_student_with_its_teachers_classifier():
    """Its logits are the teacher's of its own map, brought to the teacher's; the loss moves all but the classifier."""
    teacher = models.folded(network("resnet32x4"))
    student = models.build("vgg8+resnet32x4", 5)
    student.take_classifier(teacher)
    kept = {name: value.clone() for name, value in student.classifier.state_dict().items()}
    outputs = student(images())
    x = outputs.last_map
    for conv, norm in ((student.transfer[i], student.transfer[i + 1]) for i in (0, 3, 6)):
        x = F.conv2d(x, conv.weight, padding=conv.weight.shape[2] // 2)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = ((x - mean) / (var + norm.eps).sqrt()).relu()
    torch.testing.assert_close(outputs.projected, x, rtol=1e-4, atol=1e-4)
    assert x.shape[1] == 256 and student.transfer[3].weight.shape == (128, 128, 3, 3)
    torch.testing.assert_close(outputs.logits, teacher.fc(outputs.projected.mean((2, 3))))
    torch.testing.assert_close(student.classify(outputs.last_map), outputs.logits)

    theirs = taught("resnet32x4")
    ours, their_map = losses.same_size(outputs.projected, theirs.last_map)
    found = losses.simkd(outputs, theirs, torch.tensor([0, 3, 1, 3]))
    assert found.item() == pytest.approx(float(((ours - their_map).detach().double().numpy() ** 2).mean()), rel=1e-5)
    (found + outputs.logits.sum()).backward()
    learnt = {name for name, value in student.named_parameters() if value.grad is not None}
    assert learnt == {name for name, _ in student.named_parameters()} - {"classifier.weight", "classifier.bias"}
    torch.optim.SGD(student.parameters(), 0.1, weight_decay=0.1).step()
    for name, value in student.classifier.state_dict().items():
        assert torch.equal(value, kept[name]) and torch.equal(value, teacher.fc.state_dict()[name])


def test_simkd_from_the_flags_to_the_test(script, small, tmp_path):
    few = [*small, "--epochs", 1]
    assert script("train.py", "--model_job", "teacher", "--teacher_arch", "resnet8x4", *few).code == 0
    flags = ["--loss", "simkd", "--alpha", 0, "--teacher_arch", "resnet8x4"]
    ran = script("train_distillation.py", *flags, "--student_arch", "resnet20", *few)
    assert ran.code == 0, ran.err
    folder, name = tmp_path / "checkpoints" / "folder", "simkd_alpha0_resnet8x4_resnet20"
    teacher, student = (torch.load(folder / f"{job}.pth", weights_only=True) for job in ("teacher_resnet8x4", name))
    assert all(torch.equal(student[key], teacher[key]) for key in ("fc.weight", "fc.bias"))
    for same in ([], ["--student_arch", "resnet20"]):
        assert script("test.py", "--model_job", name, *same, *small).out.splitlines() == ran.out.splitlines()[-2:]
    result = json.loads((tmp_path / "results" / "folder" / f"{name}_seed0.json").read_text())
    assert result["recipe"]["arch"] == "resnet20+resnet8x4"
    assert result["extra_parameters"] == 64 * 128 + 128 * 128 * 9 + 128 * 256 + 2 * (128 + 128 + 256)
    refused(
        script("train_distillation.py", *flags, "--student_arch", "mobilenet_v3_small", *few),
        "mobilenet_v3_small has no classifier of one linear layer",
    )


def test_two_other_networks_from_the_flags_to_the_test(script, small, tmp_path):
    few = [*small, "--epochs", 1]
    assert script("train.py", "--model_job", "teacher", "--teacher_arch", "resnet8x4", *few).code == 0
    pair = ["--teacher_arch", "resnet8x4", "--student_arch", "vgg8"]
    ran = script("train_distillation.py", "--model_job", "distillation_LDH6", *pair, *few)
    assert ran.code == 0, ran.err
    folder = tmp_path / "checkpoints" / "folder"
    name = "distillation_LDH6_resnet8x4_vgg8"
    assert {path.name for path in folder.glob("*.pth")} == {"teacher_resnet8x4.pth", f"{name}.pth"}
    assert not any(key.startswith("proj") for key in torch.load(folder / f"{name}.pth", weights_only=True))
    tested = ran.out.splitlines()[-2:]
    by_name = ["--model_job", name]
    for flags in (by_name, [*by_name, "--student_arch", "vgg8"], ["--model_job", "distillation_LDH6", *pair]):
        assert script("test.py", *flags, *small).out.splitlines() == tested
    ran = script("test.py", *by_name, "--student_arch", "vgg13", *small)
    refused(ran, f"--student_arch vgg13: {name} is a vgg8; leave the flag away")
    refused(script("test.py", *by_name, *pair, *small), "--teacher_arch", "leave the flag away")
    result = json.loads((tmp_path / "results" / "folder" / f"{name}_seed0.json").read_text())
    assert (result["recipe"]["network"], result["recipe"]["arch"], result["stem"]) == (
        "feature_student",
        "vgg8",
        "small",
    )

    # The file itself tells which network it holds.
    ran = script("train_distillation.py", "--loss", "at", "--teacher", folder / "teacher_resnet8x4.pth", *few)
    refused(ran, "stages")
    ran = script("train_distillation.py", "--loss", "sp", "--teacher", folder / "teacher_resnet8x4.pth", *few)
    assert ran.code == 0 and (folder / "sp_alpha0.7_resnet8x4.pth").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_job", "student", "--teacher_arch", "resnet56"], ["--teacher_arch", "leave the flag away"]),
        (["--model_job", "teacher", "--student_arch", "resnet20"], ["--student_arch"]),
        (["--model_job", "student", "--student_arch", "resnet21"], ["resnet21", "resnet20"]),
        (
            ["--model_job", "student", "--student_arch", "resnet20", "--stem", "standard"],
            ["--stem standard", "resnet20"],
        ),
        (["--model_job", "student", "--student_arch", "resnet20", "--weights", "imagenet"], ["has none for resnet20"]),
    ],
)
def test_networks_that_cannot_be_had(script, small, tmp_path, flags, words):
    refused(script("train.py", *flags, *small, "--epochs", 1), *words)
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.json"))


def test_the_hint_at_a_missing_checkpoint_makes_it(script, small):
    ran = script("test.py", "--model_job", "student", "--student_arch", "resnet20", *small)
    refused(
        ran, "student_resnet20.pth does not exist", "train.py --model_job student --student_arch resnet20 --dataset"
    )
    ran = script("train_distillation.py", "--teacher_arch", "resnet56", "--training", "benchmark", *small)
    refused(ran, "train.py --model_job teacher --teacher_arch resnet56 --training benchmark --dataset folder")


def test_a_checkpoint_of_another_network(script, small, tmp_path):
    torch.save(network("resnet32").state_dict(), tmp_path / "deep.pth")
    flags = ["--model_job", "teacher", "--checkpoint", tmp_path / "deep.pth"]
    refused(script("test.py", *flags, "--teacher_arch", "resnet20", *small), "does not fit", "layer1.3")
    refused(script("test.py", *flags, *small), "network of another kind", "ResNet-50")
    checkpoint.save(
        network("resnet32"),
        tmp_path / "deep.pth",
        {
            "network": "resnet32",
            "stem": "small",
            "classes": list("abcde"),
            "image_size": 8,
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
        },
    )
    refused(script("test.py", *flags, "--teacher_arch", "resnet20", *small), "holds a resnet32, not the resnet20")


def test_a_stem_that_the_file_does_not_tell(script, small, tmp_path):
    """Another --stem for a foreign teacher is another run, and it learns from other outputs."""
    torch.save(models.build("mobilenet_v2", 4, "small").state_dict(), tmp_path / "foreign.pth")
    flags = ["--teacher", "foreign.pth", "--teacher_arch", "mobilenet_v2", "--student_arch", "resnet20"]
    common = ["train_distillation.py", *flags, *small, "--epochs", 1]
    assert script(*common).code == 0
    refused(script(*common, "--stem", "standard"), "stem")
    result = json.loads(next((tmp_path / "results" / "folder").glob("*_seed0.json")).read_text())
    assert result["teacher"]["stem"] == "small"
    own = tmp_path / "own.pth"
    checkpoint.save(models.build("resnet20", 4), own)
    for path, arch, expected in (("foreign.pth", "mobilenet_v2", "standard"), (own, "resnet20", None)):
        recipe = cli.of_arch(RECIPES["teacher"], arch)
        assert jobs.load(recipe, tmp_path / path, "folder", "standard" if expected else "auto", 8).stem == expected


@pytest.mark.parametrize("right", ["standard", "transform_input"])
def test_a_setting_that_the_file_does_not_tell(tmp_path, cpu, right, capsys):
    """It is found by the training images, told in a line, and part of what the teacher is."""
    torch.manual_seed(0)
    network, seen = models.build("googlenet", 3, right).eval(), []
    pixels, labels = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8), torch.arange(12) % 3
    network.fc.register_forward_pre_hook(lambda module, given: seen.append(given[0].double()))
    with torch.no_grad():  # its last layer, so that it is right on all images
        network((pixels.permute(0, 3, 1, 2) / 255 - 0.4) / 0.3)
        centred = seen[0] - seen[0].mean(0)
        network.fc.weight.copy_((torch.linalg.pinv(centred) @ (F.one_hot(labels, 3) - 1 / 3).double()).T * 20)
        network.fc.bias.copy_(-(network.fc.weight @ seen[0].mean(0).float()))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    images = Dataset("folder", Split(pixels, labels), Split(pixels, labels), tuple("abc"), (0.4,) * 3, (0.3,) * 3)
    recipe = cli.of_arch(RECIPES["teacher"], "googlenet")
    trained = jobs.load(recipe, tmp_path / "x.pth")
    found = jobs.settled(trained, images, cpu, tmp_path / "x.pth")
    assert jobs.evaluate(found.network, images, cpu)["top1"] == 100
    assert found.network.transform_input == (right == "transform_input") and not found.unsure
    assert found.stem == ("transform_input" if right == "transform_input" else None)
    line = f"taken {'with' if right == 'transform_input' else 'without'} transform_input: of 12 training images 100.0 %"
    err = capsys.readouterr().err
    assert (line in err) if right == "transform_input" else ("taken without transform_input" in err)
    told = jobs.load(recipe, tmp_path / "x.pth", stem=right)
    assert jobs.settled(told, images, cpu, tmp_path / "x.pth") is told and told.stem == found.stem
    with pytest.raises(UserError, match="x.pth does not say .* --stem transform_input or --stem standard tells"):
        jobs.settled(trained, replace(images, train=None), cpu, tmp_path / "x.pth")
    checkpoint.save(
        network, tmp_path / "own.pth", {**ABOUT, "network": "googlenet", "stem": right, "classes": ["a", "b", "c"]}
    )
    own = jobs.load(recipe, tmp_path / "own.pth")
    assert own.network.transform_input == found.network.transform_input and not own.unsure and own.stem is None
    setup = jobs.Setup(images, cpu, tmp_path, tmp_path, weights="imagenet")
    assert jobs.stem_of(recipe, setup) == "transform_input"
    assert jobs.stem_of(recipe, replace(setup, weights="none")) == "standard"
    assert jobs.stem_of(RECIPES["teacher"], setup) == "small"


def test_statistics_of_a_teacher(script, small, light):
    """The teacher sees its images normalised as it is told; a run so told is another run."""

    def top1(*flags):
        tested = ["test.py", "--model_job", "teacher", "--teacher_arch", "resnet20", "--checkpoint", light[1]]
        return script(*tested, *small, *flags).out

    assert top1() != top1("--teacher_mean", "imagenet", "--teacher_std", "0.9,0.8,0.01")
    flags = ["train_distillation.py", *light, *small, "--epochs", 1]
    assert script(*flags, "--teacher_mean", "0.5,0.5,0.5", "--teacher_std", "imagenet").code == 0
    refused(script(*flags), "teacher.normalisation")
    raw = ["--teacher_mean", "0,0,0", "--teacher_std", "1,1,1"]  # pixels from 0 to 1, as many a teacher is fed
    assert script(*flags, "--name", "raw", *raw).code == 0
    refused(script(*flags, "--teacher_mean", "0,0,0", "--teacher_std", "0,1,1"), "--teacher_std", "from 0.000001")
    refused(script(*flags, "--teacher_mean", "-1,0,0", "--teacher_std", "1,1,1"), "--teacher_mean")
    refused(script(*flags, "--teacher_mean", "0.5,0.5,0.5"), "belong together")
    refused(script(*flags, "--teacher_mean", "0.5,0.5", "--teacher_std", "imagenet"), "three numbers")
    told = script(*flags, "--name", "fed_wrongly", "--teacher_mean", "9,9,9", "--teacher_std", "imagenet")
    assert "--teacher_mean" in told.err and "by chance" in told.err


ABOUT = {
    "stem": "small",
    "classes": [f"class{k}" for k in range(4)],
    "image_size": 8,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
}
MADE_HERE = {  # each kind of checkpoint: the network in it, and whether it is in the older layout, which tells nothing
    "teacher": ("teacher", False),
    "student": ("student", False),
    "LDH student": ("feature_student", False),
    "LDH student in the older layout": ("feature_student", True),
    "simkd student": ("resnet20+resnet8x4", False),
    "another network": ("wrn_16_2", False),
    "of a library": ("mobilenet_v2", False),
}


def made_here(kind, path):
    name, older = MADE_HERE[kind]
    torch.manual_seed(0)
    made = models.build(name, 4).eval()
    state = made.state_dict()
    if older:
        names = {new: old for old, new in checkpoint.LEGACY_PREFIXES.items()}
        change = {
            key: next((old + key[len(n) :] for n, old in names.items() if key.startswith(n)), key) for key in state
        }
        torch.save({change[key]: value for key, value in state.items()}, path)
    else:
        checkpoint.save(made, path, {**ABOUT, "network": name})
    return name, made


@pytest.mark.parametrize("kind", MADE_HERE)
def test_whatever_was_made_here_can_be_a_teacher(tmp_path, kind):
    """Without a flag that names its network."""
    name, made = made_here(kind, tmp_path / "x.pth")
    args = argparse.Namespace(teacher_arch=None, weights_key=None, training="reference")
    trained = jobs.load(cli.teacher_recipe(args, tmp_path / "x.pth"), tmp_path / "x.pth")
    teacher, recipe = trained.network.eval(), Recipe("row", "row", "student", 1, 1, soft="kd", alpha=0.0)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images()).logits, made(images()).logits)
        torch.testing.assert_close(models.folded(teacher)(images()).logits, made(images()).logits, rtol=1e-4, atol=1e-4)
    losses.Objective(recipe, models.shapes(network("resnet20"), SIDE, 4), models.shapes(teacher, SIDE, 4))
    if "+" in name:
        with pytest.raises(UserError, match="has its classifier behind a transfer"):
            models.build(f"resnet20+{name}", 4)


@pytest.mark.parametrize("kind", MADE_HERE)
@pytest.mark.parametrize("reusing", [False, True])
def test_whatever_was_made_here_can_be_a_start(tmp_path, kind, reusing):
    """Of the same network, and of one that reuses a teacher's classifier: all but what belongs to a distillation."""
    name, made = made_here(kind, tmp_path / "x.pth")
    plain = models.without_projector(name.partition("+")[0])
    if reusing and kind == "of a library":
        pytest.skip("mobilenet_v2 has no classifier that can be reused")
    arch = f"{plain}+resnet8x4" if reusing else plain
    started = models.build(arch, 7)
    before = {key: value.clone() for key, value in started.state_dict().items()}
    checkpoint.start(started, str(tmp_path / "x.pth"), arch)
    fresh = {*models.own_weights(arch, "small")} - {*models.stem_weights(plain)}
    assert fresh and all(value.equal(before[key]) for key, value in started.state_dict().items() if key in fresh)
    taken = {key: value for key, value in started.state_dict().items() if key not in fresh}
    assert len(taken) > 50 and all(value.equal(made.state_dict()[key]) for key, value in taken.items())


def test_a_checkpoint_made_here_is_tested_as_what_it_says(script, small, tmp_path):
    """Whatever the job; a flag that names another network is refused."""
    made_here("another network", tmp_path / "x.pth")
    asked = ["test.py", "--checkpoint", "x.pth", *small, "--model_job"]
    outs = {script(*asked, job).out for job in ("teacher", "student", "distillation_LDH6")}
    assert len(outs) == 1 and "Top-1" in outs.pop()
    refused(script(*asked, "student", "--student_arch", "resnet20"), "holds a wrn_16_2, not the resnet20")
    refused(script(*asked, "teacher", "--weights_key", "ema"), "--weights_key: x.pth was made here")
    made_here("student", tmp_path / "x.pth")
    refused(script(*asked, "student", "--stem", "standard"), "--stem standard: x.pth has the small one")


@pytest.mark.parametrize("flags", [["--weights", "none"], ["--teacher", "x.pth"]])
def test_a_key_without_a_file_that_it_is_for(script, small, tmp_path, flags):
    made_here("student", tmp_path / "x.pth")
    job = ["train_distillation.py"] if "--teacher" in flags else ["train.py", "--model_job", "student"]
    refused(script(*job, *flags, *small, "--weights_key", "ema"), "--weights_key: no file here")


def test_another_set_of_a_teachers_weights_is_another_teacher(script, small, tmp_path):
    torch.manual_seed(0)
    one, other = (models.build("resnet20", 4).state_dict() for _ in range(2))
    torch.save({"state_dict": one, "state_dict_ema": other}, tmp_path / "x.pth")
    flags = ["train_distillation.py", "--teacher", "x.pth", "--teacher_arch", "resnet20", "--student_arch", "resnet20"]
    flags += [*small, "--epochs", 1]
    ran = script(*flags)
    assert ran.code == 0 and "taking state_dict; --weights_key NAME takes another" in ran.err
    refused(script(*flags, "--weights_key", "state_dict_ema"), "teacher.weights_key")
    kept = {
        path.name.partition("_")[0] for path in (tmp_path / "checkpoints" / "folder" / "teacher_cache").glob("*.np*")
    }
    assert script(*flags, "--weights_key", "state_dict_ema", "--name", "ema").code == 0
    now = {
        path.name.partition("_")[0] for path in (tmp_path / "checkpoints" / "folder" / "teacher_cache").glob("*.np*")
    }
    assert len(kept) == len(now) == 1 and kept != now
    started = ["train.py", "--model_job", "student", "--student_arch", "resnet20", "--weights", "x.pth", *small]
    for name, key in (("a", []), ("b", ["--weights_key", "state_dict_ema"])):
        assert script(*started, "--epochs", 1, "--name", name, *key).code == 0
    a, b = (json.loads((tmp_path / "results" / "folder" / f"{name}_seed0.json").read_text()) for name in "ab")
    assert b["weights"] == f"{a['weights']}, state_dict_ema" and a["checkpoint_sha256"] != b["checkpoint_sha256"]


def test_a_start_of_another_stem(tmp_path):
    """Its first convolution starts anew, as that of ImageNet's weights under the stem for small images."""
    checkpoint.save(models.build("student", 4), tmp_path / "x.pth", {**ABOUT, "network": "student"})
    started = models.build("resnet18", 4, "standard")
    before = started.conv1.weight.clone()
    checkpoint.start(started, str(tmp_path / "x.pth"), "resnet18", "standard")
    assert started.conv1.weight.equal(before)
    with pytest.raises(UserError, match="holds a student, not a ResNet-50"):
        checkpoint.start(models.build("teacher", 4), str(tmp_path / "x.pth"))


def test_feature_terms_beside_any_loss(script, small, light, tmp_path):
    for flags in (["--beta", 0.5], ["--gamma", 0.1]):
        ran = script("train_distillation.py", "--loss", "dkd", *flags, *light, *small, "--epochs", 1)
        assert ran.code == 0, ran.err
        assert {"--beta": "mse ", "--gamma": "s2t "}[flags[0]] in ran.err
    names = {path.stem for path in (tmp_path / "checkpoints" / "folder").glob("*.pth")}
    assert names == {"dkd_alpha0.7_beta0.5_resnet20_resnet20", "dkd_alpha0.7_gamma0.1_resnet20_resnet20"}
    few = [*small, "--epochs", 1, "--alpha", 0.5]
    assert script("train_distillation.py", "--loss", "kd", "--beta", 1, *light[:4], "--loss", "kd", *few).code == 0
