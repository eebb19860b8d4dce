"""One more loss is one entry and one row: whatever it needs of the teacher, may be set, and learns."""

import json

import pytest
import torch
import torch.nn.functional as F
from as_processes import thin
from torch import nn

import losses
import models
from losses import Loss, Setting
from recipes import RECIPES, Recipe
from util.bounds import POSITIVE
from util.runstate import Keeper


def logit_mse(student, teacher, labels, scale):
    return F.mse_loss(student.logits, teacher.logits / scale)


def map_l1(student, teacher, labels):
    ours, theirs = losses.same_size(student.last_map.float(), teacher.last_map.float())
    return F.l1_loss(ours.mean(1), theirs.mean(1))


def two_stages(student, teacher, labels):
    pairs = [(student.maps[name].float(), teacher.maps[name].float()) for name in ("stage2", "stage3")]
    return sum(F.mse_loss(ours.mean(1), theirs.mean(1)) for ours, theirs in pairs)


def regressed(student, teacher, labels, parts):
    return F.mse_loss(parts(student.maps["stage1"]).float(), teacher.maps["stage1"].float())


ENTRIES = {
    "logit_mse": Loss(logit_mse, settings={"scale": Setting(2.0, POSITIVE, "divides the teacher's logits")}),
    "map_l1": Loss(map_l1, needs=("last_map",)),
    "two_stages": Loss(two_stages, needs=("stage2", "stage3")),
    "regressed": Loss(
        regressed,
        needs=("stage1",),
        parts=lambda student, teacher: nn.Conv2d(student.maps["stage1"][0], teacher.maps["stage1"][0], 1),
    ),
}


@pytest.fixture
def more(monkeypatch, tmp_path, scaled_like_trained):
    """The entries and a row for each, a teacher to distil from; gives the rows."""
    rows = {}
    for name, entry in ENTRIES.items():
        row = Recipe(f"distillation_{name}", f"Distilled_{name}", "student", 50, 20, soft=name, alpha=0.5)
        monkeypatch.setitem(losses.LOSSES, name, entry)
        monkeypatch.setitem(RECIPES, row.job, row)
        rows[name] = row
    folder = tmp_path / "checkpoints" / "folder"
    folder.mkdir(parents=True)
    thin(monkeypatch.setattr)
    torch.save(scaled_like_trained(models.build("teacher", 4)).state_dict(), folder / "resnet50.pth")
    return rows


def result_of(folder, row):
    return json.loads((folder / f"{row.job}_seed0.json").read_text())


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_and_a_row_are_all(script, small, more, tmp_path, name):
    """With the teacher's outputs remembered and live, to the same figures."""
    row, common = more[name], [*small, "--epochs", 2, "--batch_size", 20]
    found = []
    for cache in ("auto", "off"):
        folders = ["--results_dir", tmp_path / cache, "--name", f"run_{cache}", "--teacher_cache", cache]
        ran = script("train_distillation.py", "--model_job", row.job, *common, *folders)
        assert ran.code == 0, ran.err
        assert f"  {name} " in ran.err.splitlines()[-1]
        found.append(json.loads((tmp_path / cache / f"run_{cache}_seed0.json").read_text())["epochs"])
    for remembered, live in zip(*found, strict=True):
        assert remembered["train_loss"] == pytest.approx(live["train_loss"], rel=1e-4)
        expected = 0.5 * remembered["ce"] + 0.5 * remembered[name]
        assert remembered["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_table_has_them(script, small, more, tmp_path):
    rows = [more["logit_mse"], more["regressed"]]
    ran = script("reproduce.py", *small, "--epochs", 1, "--jobs", "student", *(row.job for row in rows))
    assert ran.code == 0, ran.err
    table = (tmp_path / "results" / "folder" / "RESULTS.md").read_text()
    assert all(f"| {row.job} |" in table for row in rows)


def test_settings_are_flags_with_defaults_and_bounds(script, small, more, tmp_path):
    common = ["--model_job", more["logit_mse"].job, *small, "--epochs", 1]
    assert script("train_distillation.py", *common).code == 0
    assert result_of(tmp_path / "results" / "folder", more["logit_mse"])["recipe"]["scale"] == 2.0
    ran = script("train_distillation.py", *common, "--scale", 3)  # another run, which does not take that one's place
    assert ran.code == 2 and "recipe.scale: 2.0 there, 3.0 now" in ran.err
    for flags, words in [
        (["--scale", 0], "--scale: 0 is not a finite number above 0"),
        (["--T", 4], "has no T, it has scale"),
        (["--model_job", more["map_l1"].job, "--scale", 4], "has no scale, it has no settings"),
    ]:
        ran = script("train_distillation.py", *common, *flags)
        assert ran.code == 2 and words in ran.err, ran.err


def test_what_a_loss_learns_is_trained_and_resumed_and_not_in_the_checkpoint(script, small, more, tmp_path):
    """Stopped after its first epoch and resumed, the run ends in the same weights."""
    row = more["regressed"]
    common = ["--model_job", row.job, *small, "--batch_size", 20, "--epochs", 3]
    assert script("train_distillation.py", *common).code == 0
    path = tmp_path / "checkpoints" / "folder" / f"{row.checkpoint}.pth"
    keys = torch.load(path, weights_only=True)
    assert keys and not any("parts" in key or "regress" in key for key in keys)
    whole = path.read_bytes()

    kept = Keeper.save

    def stop(self, state):
        kept(self, state)
        assert state["parts"], "what the loss learns is not in the state"
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Keeper, "save", stop)
        assert script("train_distillation.py", *common, "--overwrite").code == 130
    ran = script("train_distillation.py", *common, "--resume")
    assert ran.code == 0 and "going on after 1 epochs" in ran.err
    assert path.read_bytes() == whole


def test_student_to_teacher_alone(script, small, more, monkeypatch, tmp_path):
    """A row of cross-entropy and S2T, without any soft loss."""
    row = Recipe("distillation_s2t", "Distilled_s2t", "feature_student", 50, 20, gamma=0.5)
    monkeypatch.setitem(RECIPES, row.job, row)
    ran = script("train_distillation.py", "--model_job", row.job, *small, "--epochs", 1)
    assert ran.code == 0, ran.err
    figures = result_of(tmp_path / "results" / "folder", row)["epochs"][0]
    assert figures["train_loss"] == pytest.approx(figures["ce"] + 0.5 * figures["s2t"], rel=1e-5)


def test_a_loss_that_is_not_there_is_named(script, small, more, monkeypatch):
    row = Recipe("distillation_typo", "Distilled_typo", "student", 50, 20, soft="kdd")
    monkeypatch.setitem(RECIPES, row.job, row)
    ran = script("train_distillation.py", "--model_job", row.job, *small)
    assert ran.code == 2 and "there is no loss kdd; there are kd, mse" in ran.err
