"""predict.py: the same classes from a checkpoint and from what was exported of it; images that can't be read."""

import builtins
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import checkpoint
import models
from images.folders import read_image

CLASSES = ["cat", "dog", "a bird", "cow", "owl", "pig"]
ABOUT = {
    "job": "student", "network": "student", "stem": "small", "classes": CLASSES, "image_size": 16,
    "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2],
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three images of other sizes than the network's, one below another folder, and a text."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (root / "more").mkdir()
    for name, shape in (("a.png", (40, 60)), ("b.jpg", (33, 20)), ("more/c.png", (16, 16))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(root / name)
    (root / "notes.txt").write_text("hello")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scaled_like_trained):
    torch.manual_seed(2)
    network = scaled_like_trained(models.build("student", len(CLASSES))).eval()
    path = tmp_path_factory.mktemp("model") / "resnet18.pth"
    checkpoint.save(network, path, ABOUT)
    return path, network


def lines(ran):
    return [line.split("\t") for line in ran.out.splitlines()]


def test_the_best_five_are_the_networks(script, trained, photos):
    path, network = trained
    ran = script("predict.py", "--model", path, photos, photos / "a.png", "--device", "cpu")
    assert ran.code == 0 and "notes.txt" in ran.err and len(ran.err.splitlines()) == 1
    files = [photos / "a.png", photos / "b.jpg", photos / "more" / "c.png", photos / "a.png"]
    assert [line[0] for line in lines(ran)] == list(map(str, files))
    for file, line in zip(files, lines(ran), strict=True):
        pixels = torch.from_numpy(np.asarray(read_image(file, 16)).copy()).float() / 255
        images = ((pixels - torch.tensor(ABOUT["mean"])) / torch.tensor(ABOUT["std"])).permute(2, 0, 1)[None]
        best = network(images).logits.softmax(1)[0].topk(5)
        assert [re.sub(r" [\d.]+%$", "", field) for field in line[1:]] == [CLASSES[k] for k in best.indices]
        shown = [float(field.rpartition(" ")[2].rstrip("%")) for field in line[1:]]
        assert shown == pytest.approx((100 * best.values).tolist(), abs=0.01)  # of which printing takes 0.005


def test_a_job_by_its_name(script, trained, photos, tmp_path):
    folder = tmp_path / "checkpoints" / "digits"
    folder.mkdir(parents=True)
    (folder / "resnet18.pth").write_bytes(trained[0].read_bytes())
    by_job = script("predict.py", "--model_job", "student", "--dataset", "digits", photos, "--device", "cpu")
    assert by_job.code == 0 and by_job.out == script("predict.py", "--model", trained[0], photos).out


def test_unreadable_images_are_named_and_the_others_done(script, trained, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    (tmp_path / "none").mkdir()
    ran = script(
        "predict.py", "--model", trained[0], tmp_path / "bad.jpg", photos / "a.png", tmp_path / "none", "no.png"
    )
    assert ran.code == 2 and [line[0] for line in lines(ran)] == [str(photos / "a.png")]
    for words in ("none holds no images", "bad.jpg: no image", "no.png", "3 of what was given can't be read"):
        assert words in ran.err
    assert len(ran.err.splitlines()) == 4 and "Traceback" not in ran.err


def test_bad_models(script, trained, photos, tmp_path):
    bare, broken, program = tmp_path / "bare.pth", tmp_path / "broken.onnx", tmp_path / "broken.pt2"
    checkpoint.save(trained[1], bare)
    broken.write_bytes(b"not ONNX")
    program.write_bytes(b"no program")
    cases = [
        (["--model", bare], "says nothing of its classes"),
        (["--model", tmp_path / "no.onnx"], "no.onnx does not exist"),
        (["--model", tmp_path / "no.pth"], "no.pth does not exist"),
        (["--model", program, "--trust_pt2"], "damaged"),
        (["--model_job", "nobody"], "nobody"),
        (["--model", bare, "--model_job", "student"], "not allowed with"),
        ([], "--model_job --model"),
        (["--model", bare, "--seed", 1], "--seed is for --model_job, not for --model; leave the flag away"),
        (["--model", bare, "--dataset", "digits"], "--dataset is for --model_job"),
        (["--model", bare, "--trust_pt2"], "--trust_pt2 is for a .pt2 file"),
        (["--model_job", "student", "--trust_pt2"], "--trust_pt2 is for --model, not for --model_job"),
    ]
    for flags, words in cases:
        ran = script("predict.py", *flags, photos)
        assert ran.code == 2 and ran.out == "" and words in ran.err and "Traceback" not in ran.err, (flags, ran)
        assert len(ran.err.splitlines()) == 1, ran.err


def test_bad_onnx_models(script, photos, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    broken, foreign = tmp_path / "broken.onnx", tmp_path / "foreign.onnx"
    broken.write_bytes(b"not ONNX")
    x = onnx.helper.make_tensor_value_info("x", 1, [1])
    y = onnx.helper.make_tensor_value_info("y", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), foreign)
    for path, words in ((broken, "damaged"), (foreign, "says nothing of its classes")):
        ran = script("predict.py", "--model", path, photos)
        assert ran.code == 2 and words in ran.err and len(ran.err.splitlines()) == 1, ran


def onnx_model(path, about=ABOUT, *, value=None, input="images", output="logits", kind="UINT8"):
    """Write an ONNX model that says that it is one of ours, and gives the value whatever the images."""
    import onnx

    h, value = onnx.helper, np.zeros((1, len(CLASSES)), np.float32) if value is None else value
    tensor = onnx.numpy_helper.from_array(value)
    graph = h.make_graph(
        [h.make_node("Constant", [], [output], value=tensor)], "g",
        [h.make_tensor_value_info(input, getattr(onnx.TensorProto, kind), ["n", "h", "w", 3])],
        [h.make_tensor_value_info(output, tensor.data_type, list(value.shape))],
    )  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)
    for key, text in checkpoint.to_metadata(about).items():
        model.metadata_props.add(key=key, value=text)
    onnx.save(model, path)
    return path


def test_an_onnx_model_is_held_to_what_it_says(script, photos, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ran = script("predict.py", "--model", onnx_model(tmp_path / "right.onnx"), photos / "a.png")
    assert ran.code == 0 and "nan" not in ran.out
    cases = {
        "fewer classes": {"value": np.zeros((1, 3), np.float32)},
        "more classes": {"value": np.zeros((1, 9), np.float32)},
        "whole numbers": {"value": np.zeros((1, 6), np.int64)},
        "text": {"value": np.array([["a"] * 6], object)},
        "one axis": {"value": np.zeros(6, np.float32)},
        "another batch": {"value": np.zeros((2, 6), np.float32)},
        "NaN": {"value": np.full((1, 6), np.nan, np.float32)},
        "inf": {"value": np.full((1, 6), np.inf, np.float32)},
        "input's name": {"input": "x"},
        "output's name": {"output": "y"},
        "input's type": {"kind": "FLOAT"},
        "a size of text": {"about": {**ABOUT, "image_size": "16"}},
        "a huge size": {"about": {**ABOUT, "image_size": 10**9}},
        "no mean": {"about": {key: value for key, value in ABOUT.items() if key != "mean"}},
    }
    for what, options in cases.items():
        path = onnx_model(tmp_path / "x.onnx", **options)
        ran = script("predict.py", "--model", path, photos / "a.png")
        assert ran.code == 2 and ran.out == "" and "x.onnx" in ran.err or what in ("NaN", "inf"), (what, ran)
        assert "Traceback" not in ran.err and "nan" not in ran.out and ran.code == 2, (what, ran)


def test_a_missing_onnxruntime_is_asked_for(script, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "x.onnx").write_bytes(b"")
    ran = script("predict.py", "--model", tmp_path / "x.onnx", photos)
    assert ran.code == 2 and "needs onnxruntime; pip install onnxruntime" in ran.err


# docs/own_images.md


def test_the_readmes_snippet_takes_a_student_elsewhere(tmp_path, monkeypatch):
    """As it stands, with no module of this project: a feature student becomes torchvision's own ResNet-18."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_images.md").read_text(), re.DOTALL)
    snippets = [block for block in blocks if "proj." in block]
    assert len(snippets) == 1
    network = models.build("feature_student", 100).eval()
    checkpoint.save(network, tmp_path / "checkpoints" / "Distilled_resnet18_LDH6.pth")
    monkeypatch.chdir(tmp_path)
    ours = {path.stem for path in ROOT.glob("*.py")}
    imported = builtins.__import__

    def without_ours(name, *args, **options):
        assert name not in ours
        return imported(name, *args, **options)

    names = {"__builtins__": {**vars(builtins), "__import__": without_ours}}
    exec(snippets[0], names)
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(names["model"](images), network(images).logits, atol=1e-5)
