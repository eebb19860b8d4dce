"""compare.py: results side by side, and the sheet of images on which they disagree."""

import numpy as np
import pytest
import torch
from as_processes import thin
from PIL import Image
from scipy.stats import binomtest
from test_report import TEN, put, put_images
from test_scripts import refused

import data
import report
from report import plots, side_by_side

STUDENT, KD = "student", "distillation"


def table(out):
    """Title -> cells, of the lines whose title is followed by two spaces."""
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    parts = [[cell.strip() for cell in line.strip().split("  ") if cell.strip()] for line in lines]
    return {title: cells for title, *cells in parts}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


# the table


def test_settings_figures_and_mcnemar(script, folder):
    put_images(folder, STUDENT, "xxxx....xxxxxxxxxxxx")
    put_images(folder, KD, "xxx.xxxxxxxxxxxxxxxx", augment=True)
    ran = script("compare.py", STUDENT, KD)
    assert ran.code == 0 and ran.err == ""
    found = table(ran.out)
    assert ran.out.splitlines()[0].split() == ["student_seed0", "distillation_seed0"]
    assert found["job"] == [STUDENT, KD] and found["augment"] == ["False", "True"]
    assert found["recipe.alpha"] == ["1", "0.7"] and found["recipe.T"] == ["-", "2"]
    assert found["teacher.sha256"] == ["-", "ab"]
    same = {"dataset", "data.classes", "seed", "precision", "recipe.learning_rate", "versions.torch", "weights"}
    assert not (same | {"recipe.job", "name", "command", "checkpoint"}) & found.keys()
    assert found["top-1, %"] == ["80.00", "95.00"] and found["top-5, %"] == ["85.00", "95.00"]
    assert found["Test Loss"] == ["0.01058444"] * 2
    assert found["test images"] == ["20", "20"]
    assert found["points of top-1"] == ["-", "+15.00"]
    assert found["images that it alone got right"] == ["-", "4"]
    assert found["images that student_seed0 alone got right"] == ["-", "1"]
    assert found["p of McNemar's exact test"] == ["-", f"{binomtest(4, 5).pvalue:.3g}"]
    assert "Holm" not in ran.out
    ends = {len(line) for line in ran.out.splitlines() if line.strip() and ":" not in line and line[-1] != "y"}
    assert len([end for end in ends if end > 45]) == 1  # the last column is aligned


def test_settings_that_one_result_alone_tells(folder):
    put_images(folder, STUDENT, "x.")
    path = put_images(folder, STUDENT, "xx", seed=1, processes=2, warm_start={"epochs": 3})
    runs = side_by_side_of(folder / "student_seed0.json", path)
    found = table(side_by_side.text(runs))
    assert found["seed"] == ["0", "1"] and found["processes"] == ["1", "2"] and found["warm_start.epochs"] == ["-", "3"]
    assert "warm_start" not in found


def side_by_side_of(*paths):
    from report.results import Result

    return {path.stem: Result.read(path) for path in paths}


def test_long_values_are_cut(folder):
    first = put_images(folder, STUDENT, "x.", device="x" * 100)
    second = put_images(folder, KD, "xx", device="a CPU", teacher={"sha256": "0123456789abcdef"})
    found = table(side_by_side.text(side_by_side_of(first, second)))
    assert found["device"] == ["x" * 39 + "…", "a CPU"] and found["teacher.sha256"] == ["-", "012345678…"]


def test_several_runs_are_each_held_against_the_first(script, folder):
    put_images(folder, STUDENT, "." * 10)
    put_images(folder, KD, "x" * 10)
    put_images(folder, "distillation_LDH", "x" * 6 + "." * 4)
    ran = script("compare.py", STUDENT, KD, "distillation_LDH")
    found = table(ran.out)
    assert found["points of top-1"] == ["-", "+100.00", "+60.00"]
    p, q = (2 / 2**n for n in (10, 6))
    assert found["p of McNemar's exact test"] == ["-", f"{p:.3g}", f"{q:.3g}"]
    assert found["the same, by Holm for 2 tests"] == ["-", f"{2 * p:.3g}", f"{q:.3g}"]


def test_runs_tested_on_other_images(script, folder, tmp_path):
    put_images(folder, STUDENT, "x.x.")
    two = {**TEN, "test_images": 2, "test_fingerprint": "two"}
    put(folder, KD, None, dataset="folder", data=two, right=np.array([True, True]))
    put(folder, "distillation_LDH", 60.0)
    other = put_images(folder, "distillation_LDH2", "x...")
    ran = script("compare.py", STUDENT, KD, "distillation_LDH", other)
    assert ran.code == 0
    found = table(ran.out)
    assert found["top-1, %"] == ["50.00", "100.00", "60.00", "25.00"]
    assert found["points of top-1"] == ["-", "-", "-", "-25.00"]
    assert ran.err.splitlines() == [
        "student_seed0 and distillation_seed0 can't be compared image by image: other test images",
        "student_seed0 and distillation_LDH_seed0 can't be compared image by image: distillation_LDH_seed0 does not "
        "tell which images it got right",
    ]
    ran = script("compare.py", STUDENT, KD, "--sheet", "a.png")
    assert ran.code == 2 and table(ran.out)["top-1, %"] == ["50.00", "100.00"] and "image by image\n" not in ran.out
    assert ran.err.splitlines()[-1].startswith("compare.py: error: --sheet: the runs can't be compared image by image")
    assert not (tmp_path / "a.png").exists()


# what is named


def test_runs_by_their_names_and_files(script, folder, tmp_path):
    put_images(folder, STUDENT, "x.")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = put_images(elsewhere, STUDENT, "xx")
    for seed in (0, 1):
        put_images(folder, KD, "xx", seed=seed)
    put_images(folder, KD, "xx", name="student_seedling")
    assert script("compare.py", STUDENT, "distillation_seed1").out.split()[:2] == [
        "student_seed0",
        "distillation_seed1",
    ]
    ran = script("compare.py", "student_seed0", path)  # of the same name
    assert ran.out.split()[:2] == ["results/student_seed0.json", str(path)]
    ran = script("compare.py", "results/student_seed0.json", "distillation_seed0")
    assert ran.out.split()[:2] == ["student_seed0", "distillation_seed0"]
    refused(
        script("compare.py", STUDENT, KD), "distillation ran with 2 seeds", "distillation_seed0, distillation_seed1"
    )
    refused(script("compare.py", STUDENT, "distilation"), "distilation: no run of that name in results", KD)
    refused(script("compare.py", STUDENT, "gone.json"), "gone.json: there is no such file")
    refused(script("compare.py", STUDENT, folder / "student_seed0.json"), "is named twice")
    refused(script("compare.py", STUDENT), "name another one")
    refused(
        script("compare.py", STUDENT, KD, "--dataset", "digits"), "results/digits holds no results", "--results_dir"
    )
    refused(script("compare.py", STUDENT, path, "--sheet", "a.jpg"), "a.jpg: a sheet is a PNG")
    refused(script("compare.py", STUDENT, KD, "--stream"), "--stream is for --sheet; give that, or leave the flag away")
    refused(script("compare.py", STUDENT, KD, "--image_size", 8), "--image_size is for --sheet")
    (folder / "damaged_seed0.json").write_text("{")
    refused(script("compare.py", STUDENT, "damaged"), "damaged_seed0.json is damaged")


# the sheet


def test_disagreement():
    def of(*marks, most=48):
        index, found = side_by_side.disagreement(np.array([[mark == "x" for mark in run] for run in marks]), most)
        return index.tolist(), found

    assert of("xx..x.", "x.x..x") == ([1, 4, 2, 5], 4)  # first those that the first run got right
    assert of("xx..", "xx..") == ([], 0)
    assert of("x.x.", "xx..", "x...") == ([2, 1], 2)
    assert of("xx..", ".x..", ".xx.", "....") == ([1, 0, 2], 3)  # one of four is right, or three are
    assert of("xxx...", "......", "x.x...", "......") == ([0, 2], 2)  # two of four are right
    assert of("x" * 100, "." * 100, most=4) == ([0, 33, 66, 99], 100)
    index, found = of("x" * 90 + "." * 10, "." * 90 + "x" * 10, most=10)
    assert found == 100 and len(set(index)) == 10 and sum(i < 90 for i in index) == 9


@pytest.fixture
def drawn(monkeypatch):
    """What a sheet was drawn from."""
    calls, sheet = [], plots.sheet

    def watched(*given):
        calls.append(given)
        return sheet(*given)

    monkeypatch.setattr(plots, "sheet", watched)
    return calls


def test_a_sheet(script, tmp_path, digits, drawn, monkeypatch):
    results = tmp_path / "results" / "digits"
    results.mkdir(parents=True)
    n = len(digits.test.labels)
    numbers = {"train_images": 1500, "test_images": n, "classes": 10, "image_size": 8}
    numbers["test_fingerprint"] = digits.test_fingerprint
    first = np.arange(n) % 2 == 0
    second = first.copy()
    second[[3, 10, 100]] ^= True
    for job, right in ((STUDENT, first), (KD, second)):
        put(results, job, None, dataset="digits", data=numbers, right=right)
    args = [STUDENT, KD, "--dataset", "digits", "--sheet", "a.png"]
    ran = script("compare.py", *args)
    assert ran.code == 0 and ran.err == "wrote a.png\n"
    assert Image.open(tmp_path / "a.png").size[0] == 1200
    ((images, classes, rights, names, title),) = drawn
    assert (images == digits.test.images[[10, 100, 3]].numpy()).all()
    assert classes == [str(digits.test.labels[i].item()) for i in (10, 100, 3)]
    assert rights.tolist() == [[True, True, False], [False, False, True]]
    assert names == ["student_seed0, top-1 50.17 %", f"distillation_seed0, top-1 {100 * second.mean():.2f} %"]
    assert title == "3 of the 3 test images that one got right and the other wrong"
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(b"a photo")
    ran = script("compare.py", *args)
    assert ran.code == 2 and ran.err.endswith("give --sheet another name, or replace it with --overwrite\n")
    assert (tmp_path / "a.png").read_bytes() == b"a photo"
    assert script("compare.py", *args, "--overwrite").code == 0 and (tmp_path / "a.png").read_bytes() == before
    with monkeypatch.context() as patched:  # another process draws it meanwhile
        patched.setattr(report, "require", lambda: (tmp_path / "c.png").write_bytes(b"a photo"))
        ran = script("compare.py", *args[:-1], "c.png")
    assert ran.code == 2 and "c.png: File exists" in ran.err
    drawn.clear()

    args[-1] = "b.png"
    put(results, "distillation_LDH", None, dataset="digits", data=numbers, right=first)
    ran = script("compare.py", STUDENT, "distillation_LDH", *args[2:])
    assert ran.code == 2 and "the runs got the same images right" in ran.err
    ran = script("compare.py", *args[:2], "--results_dir", results, "--sheet", "b.png")
    assert ran.code == 2 and "--sheet: the runs were tested on digits; give --dataset digits" in ran.err
    for job, right in ((STUDENT, first), (KD, second)):
        put(results, job, None, dataset="digits", data=numbers | {"test_fingerprint": "others"}, right=right)
    ran = script("compare.py", *args)
    assert ran.code == 2 and "are not those that the runs were tested on" in ran.err
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_sheet_of_runs_on_image_files(script, small, tmp_path, monkeypatch, drawn, stream):
    """Real runs; the images' size is that of the runs."""
    thin(monkeypatch.setattr)
    for name, rate in (("a", 0.001), ("b", 0.5)):
        flags = ["--epochs", 1, "--name", name, "--learning_rate", rate]
        assert script("train.py", "--model_job", "student", *flags, *small).code == 0
    source = small[: small.index("--image_size")]
    ran = script("compare.py", "a", "b", *source, "--sheet", "a.png", *stream)
    found = table(ran.out)
    assert found["recipe.learning_rate"] == ["0.001", "0.5"], ran.err
    if found["images that it alone got right"] == found["images that a_seed0 alone got right"] == ["-", "0"]:
        pytest.skip("the runs agree on every image")
    assert ran.code == 0 and Image.open(tmp_path / "a.png").size[0] == 1200
    dataset = data.load("folder", small[3], 8)
    ((images, classes, rights, *_),) = drawn
    assert images.shape[1:] == (8, 8, 3) and (rights.sum(0) == 1).all()
    for image, name in zip(images, classes, strict=True):
        same = (dataset.test.images == torch.from_numpy(image)).all(3).all(2).all(1)
        assert dataset.classes[dataset.test.labels[same].item()] == name


def test_names_that_matplotlib_might_take_for_formulas():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    names = [r"$\a$", "b"]  # no formula, at which it would fail
    for name, title in ((r"$\x$", "a"), ("a", r"$\x$")):
        assert plots.sheet(image, [name], np.array([[True], [False]]), names, title)[:4] == b"\x89PNG"
