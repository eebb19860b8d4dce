"""Images listed in a CSV or held by parquet files, unequal classes, and images that can't be read."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import refused

import data
from data import ImageFiles
from images import folders
from util import files
from util.runtime import UserError

TRAINED = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.fixture
def tree(tmp_path):
    """A folder of two classes, three images of each for training and two for testing."""
    rng, root = np.random.default_rng(0), tmp_path / "pictures"
    for part, n in (("train", 3), ("test", 2)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for k in range(n):
                Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(root / part / label / f"{k}.png")
    return root


@pytest.fixture
def rows(tree):
    """Of each image its path from beside the folder, its class and its split, in the folder's order."""
    found = data.find(tree).files
    return [(str(path.relative_to(tree.parent)), label, part) for part in found for path, label in found[part]]


def same(one, other):
    assert one.fingerprint == other.fingerprint and one.classes == other.classes
    assert one.train.labels.equal(other.train.labels) and one.test.labels.equal(other.test.labels)
    assert (one.mean, one.std) == (other.mean, other.std)


# CSV


def write(path, rows, header=("path", "label", "split"), encoding="utf-8", **dialect):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **dialect).writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    "options",
    [
        {}, {"delimiter": ";"}, {"delimiter": "\t", "encoding": "utf-8-sig"}, {"quoting": csv.QUOTE_ALL},
        {"header": ("Path", " LABEL", "Split ")}, {"lineterminator": "\n"}, {"encoding": "utf-8-sig"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_csv_is_the_folder_that_it_lists(tree, rows, options, stream, capfd):
    path = write(tree.parent / "list.csv", rows, **options)
    given = data.load("csv", path, 8, stream)
    assert isinstance(given.train.images, ImageFiles) == stream
    same(given, data.load("folder", tree, 8))
    assert capfd.readouterr() == ("", "")


def test_a_table_as_pandas_writes_it(tree, rows):
    """With the index in front, other columns, quotes where a name needs them, and paths in any place."""
    (tree / "train" / "cat" / "0.png").rename(tree / 'a "b", c.png')
    (tree / "train" / "cat" / "1.png").rename(tree.parent / "outside.png")
    rows = [(str(tree / 'a "b", c.png'), *rows[0][1:]), ("pictures/../outside.png", *rows[1][1:]), *rows[2:]]
    table = [(k, split, 0.5, path, label) for k, (path, label, split) in enumerate(rows)]
    path = write(tree.parent / "list.csv", table, ("", "split", "score", "path", "label"))
    assert '"' in path.read_text()
    given = data.load("csv", tree.parent, 8)  # the only CSV there
    assert given.test_fingerprint == data.load("folder", tree, 8).test_fingerprint
    assert given.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_that_are_numbers_are_in_their_order(tree, rows):
    relabelled = [(path, {"cat": "10", "dog": "9"}[label], part) for path, label, part in rows]
    assert data.load("csv", write(tree.parent / "list.csv", relabelled), 8).classes == ("9", "10")
    relabelled[0] = (rows[0][0], "b", "train")
    assert data.load("csv", write(tree.parent / "list.csv", relabelled), 8).classes == ("10", "9", "b")


def test_what_a_csv_says_twice_or_for_nothing_is_told(tree, rows, capfd):
    more = [(rows[0][0], "cat", "test"), (rows[1][0], "cat", "VALID"), (rows[1][0], "dog", "val")]
    more += [(rows[1][0], "dog", "train"), (rows[0][0], "cat", "train")]
    given = data.load("csv", write(tree.parent / "list.csv", [*rows, *more]), 8)
    assert len(given.test.labels) == 5
    assert capfd.readouterr().err.splitlines() == [
        f"{tree.parent}/list.csv: split val is not used, test is",
        f"{tree.parent}/list.csv: split valid is not used, test is",
        f"in train under more than one label: {tree}/train/cat/1.png",
        f"in train more than once: {tree}/train/cat/0.png",
        f"in train and test alike: {tree}/train/cat/0.png; the test's figures are flattered",
    ]


def test_a_csv_of_test_images_alone_is_tested_on(tree, rows):
    path = write(tree.parent / "list.csv", rows[6:])
    given = data.load("csv", path, 8, classes=("dog", "cat", "eel"), **TRAINED)
    assert given.train is None and given.test.labels.tolist() == [1, 1, 0, 0] and given.num_classes == 3
    with pytest.raises(UserError, match="classes in test that the network does not know: dog"):
        data.load("csv", path, 8, classes=("cat", "eel"), **TRAINED)
    with pytest.raises(UserError, match=f"{path}: no image's split is train"):
        data.load("csv", path, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[:6], "no image with a label has the split test, or val"),
        (lambda rows: [*rows, ("pictures/gone.png", "cat", "train")] * 2, "1 of 11 files are not there; .*line 12, is"),
        (lambda rows: [*rows, (rows[0][0], "eel", "test")], "classes in test that are not in train: eel"),
        (lambda rows: [*rows, (rows[0][0], "cat", "dev")], "line 12: its split is dev; it must be train, test or val"),
        (lambda rows: [*rows, (rows[0][0], " ", "train")], "line 12 has no label"),
        (lambda rows: [*rows, ("", "cat", "train")], "line 12 has no path"),
        (lambda rows: [*rows, ("https://a/b.png", "cat", "train")], "line 12: https://a/b.png is no file"),
        (lambda rows: [*rows, (), (rows[0][0], "cat")], "line 13 has 2 cells, the first line 3"),
        (lambda rows: [(path, "cat", part) for path, _, part in rows], "has one class alone, cat"),
    ],
)
def test_what_is_wrong_in_a_csv_is_told_by_its_line(tree, rows, change, message):
    path = write(tree.parent / "list.csv", change(rows))
    with pytest.raises(UserError, match=message) as told:
        data.load("csv", path, 8)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"file,label,split\na.png,cat,train\n", "must name the columns path, label and split, .* it is file,label"),
        (b"", "it is empty"), (b"path,label,split\n", "no image's split is train"),
        ("path,label,split\na.png,\xe9,train\n".encode("latin-1"), "list.csv is not in UTF-8; save it as UTF-8"),
        (b'path,label,split\na.png,"cat,train\n', "list.csv, line 2: unexpected end of data"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_csv_is_told(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load("csv", tmp_path, 8)


def test_which_csv_is_meant_must_be_clear(tmp_path, script):
    refused(script("train.py", "--model_job", "student", "--dataset", "csv", "--data_dir", tmp_path), "no CSV file")
    for name in ("a.csv", "b.CSV"):
        (tmp_path / name).write_text("path,label,split\n")
    with pytest.raises(UserError, match="several CSV files: a.csv, b.CSV; give the file"):
        data.load("csv", tmp_path)
    with pytest.raises(UserError, match="c.csv is not there; give a CSV file"):
        data.load("csv", tmp_path / "c.csv")


def test_two_lists_in_a_folder_keep_their_own_pixels(tree, rows, monkeypatch):
    lists = [write(tree.parent / f"{k}.csv", rows[k:]) for k in range(2)]
    loaded = [data.load("csv", path, 8) for path in lists]
    assert loaded[0].fingerprint != loaded[1].fingerprint
    monkeypatch.setattr(folders, "_decode_all", lambda *args: pytest.fail("decoded again"))
    for path, before in zip(lists, loaded, strict=True):
        same(data.load("csv", path, 8), before)


# parquet


def hub(path, rows, root, names=("cat", "dog"), image="image", label="label", **options):
    """A parquet file as the hub's library writes it, of rows as in a CSV; names: None writes labels as text."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": (root / name).read_bytes(), "path": name.split("/")[-1]} for name, _, _ in rows]
    labels = [label if names is None else names.index(label) if label in names else -1 for _, label, _ in rows]
    kinds = [pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string() if names is None else pa.int64()]
    table = pa.table({image: pa.array(cells, kinds[0]), label: pa.array(labels, kinds[1])})
    told = {"_type": "Value", "dtype": "string"} if names is None else {"_type": "ClassLabel", "names": list(names)}
    about = {"info": {"features": {image: {"_type": "Image"}, label: told}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(about).encode()}), path, **options)
    return path


@pytest.fixture
def repo(tree, rows):
    """A data set as the hub has it, in two shards and several row groups; the same images as the tree."""
    root = tree.parent / "repo"
    hub(root / "data" / "train-00000-of-00002.parquet", rows[:4], tree.parent, row_group_size=3)
    hub(root / "data" / "train-00001-of-00002.parquet", rows[4:6], tree.parent)
    hub(root / "data" / "test-00000-of-00001.parquet", rows[6:], tree.parent)
    return root


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_parquet_repo_is_the_folder_of_its_images(tree, repo, stream, below, capfd):
    given = data.load("parquet", repo / below, 8, stream)
    assert isinstance(given.train.images, ImageFiles) == stream
    same(given, data.load("folder", tree, 8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{"image": "img", "label": "fine_label"}, {"names": None}, {"label": "breed"}])
def test_columns_have_the_hubs_other_names(tree, rows, options):
    for part, own in (("train", rows[:6]), ("validation", rows[6:])):
        hub(tree.parent / "p" / f"{part}-00000-of-00001.parquet", own, tree.parent, **options)
    same(data.load("parquet", tree.parent / "p", 8), data.load("folder", tree, 8))


def test_files_may_lie_in_a_folder_for_each_part(tree, rows):
    for part, own in (("train", rows[:6]), ("test", rows[6:])):
        hub(tree.parent / "p" / "default" / part / "0000.parquet", own, tree.parent)
    same(data.load("parquet", tree.parent / "p", 8), data.load("folder", tree, 8))


def test_plain_bytes_and_numbers_are_read(tree, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = [(tree.parent / name).read_bytes() for name, _, _ in rows]
    labels = [{"cat": 2, "dog": 10}[label] for _, label, _ in rows]
    table = {"image": pa.array(content, pa.large_binary()), "label": labels, "split": [part for _, _, part in rows]}
    pq.write_table(pa.table(table), tree.parent / "all.parquet")
    given = data.load("parquet", tree.parent / "all.parquet", 8)
    assert given.classes == ("2", "10") and given.fingerprint == data.load("folder", tree, 8).fingerprint


def test_classes_are_in_the_order_of_their_numbers(tree, rows):
    names = ("eel", "dog", "cat")
    for part, own in (("train", rows[:6]), ("test", rows[6:])):
        hub(tree.parent / "p" / f"{part}.parquet", own, tree.parent, names)
    given = data.load("parquet", tree.parent / "p", 8)
    assert given.classes == names and given.train.labels.tolist() == [2, 2, 2, 1, 1, 1]


def test_a_test_split_without_labels_is_passed_over(tree, rows, repo, capfd):
    (repo / "data" / "test-00000-of-00001.parquet").rename(repo / "data" / "validation-00000-of-00001.parquet")
    hub(repo / "data" / "test-00000-of-00001.parquet", [(name, "?", part) for name, _, part in rows[6:]], tree.parent)
    same(data.load("parquet", repo, 8), data.load("folder", tree, 8))
    assert capfd.readouterr().err == f"{repo}: split test is not used, validation is\n"
    hub(repo / "data" / "train-00000-of-00002.parquet", [(rows[0][0], "?", "train")], tree.parent)
    with pytest.raises(UserError, match=r"1 images of train have no label: .*of-00002.parquet\[0\]$"):
        data.load("parquet", repo, 8)


def test_images_are_copied_out_once(tree, rows, repo, monkeypatch):
    first = data.load("parquet", repo, 8, stream=True)
    seen = [batch.clone() for batch in first.train.images.read([torch.tensor([5, 0, 3])])]
    expected = data.load("folder", tree, 8).train.images[[5, 0, 3]]
    assert seen[0].equal(expected)
    with monkeypatch.context() as patch:
        patch.setattr("images.listed._Table.images", lambda self: pytest.fail("read again"))
        again = data.load("parquet", repo, 10, stream=True)
        assert next(again.train.images.read([torch.tensor([5])])).shape == (1, 10, 10, 3)
    hub(repo / "data" / "train-00001-of-00002.parquet", [rows[0], rows[5]], tree.parent)
    changed = data.load("parquet", repo, 8, stream=True)
    assert next(changed.train.images.read([torch.tensor([4])])).equal(expected[1:2])


def test_a_repo_that_cannot_be_written_is_read(tree, repo, monkeypatch, capfd):
    def refuse(path):
        raise UserError(f"cannot write {path}: read-only") from OSError(30, "read-only")

    expected = data.load("folder", tree, 8)
    monkeypatch.setattr(files, "replacing", refuse)
    same(data.load("parquet", repo, 8, stream=True), expected)
    assert "train-00000-of-00002.parquet are copied at each start (cannot write" in capfd.readouterr().err


def test_one_file_is_tested_on(repo):
    given = data.load("parquet", repo / "data" / "train-00000-of-00002.parquet", 8, classes=("dog", "cat"), **TRAINED)
    assert given.train is None and given.test.labels.tolist() == [1, 1, 1, 0]
    with pytest.raises(UserError, match=r"no image with a label has the split test, or val"):
        data.load("parquet", repo / "data" / "train-00000-of-00002.parquet", 8)


def test_an_image_within_that_cannot_be_read_is_named(tree, rows, repo):
    (tree.parent / "bad.png").write_bytes(b"no image")
    hub(repo / "data" / "train-00001-of-00002.parquet", [rows[4], ("bad.png", "dog", "")], tree.parent)
    for stream in (False, True):
        with pytest.raises(
            UserError, match=r"cannot read the image .*/train-00001-of-00002.parquet\[1\]: no image that"
        ):
            data.load("parquet", repo, 8, stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_parquet_file_that_was_replaced_is_noticed(repo, monkeypatch, stream):
    """Though its size and its time are the same."""
    first, path = data.load("parquet", repo, 8, stream), repo / "data" / "train-00000-of-00002.parquet"
    shutil.copy2(path, repo / "copy")
    (repo / "copy").replace(path)
    read, decode = [], folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda *args: read.append(args) or decode(*args))
    same(data.load("parquet", repo, 8, stream), first)
    assert len(read) == 10


@pytest.mark.parametrize("at", [10, -100, -10])
def test_a_damaged_copy_of_a_parquet_files_images_is_made_anew(repo, at):
    first = data.load("parquet", repo, 8)
    kept = repo / "data" / ".train-00000-of-00002.parquet.images"
    content = bytearray(kept.read_bytes())
    content[at] ^= 1
    kept.write_bytes(content)
    same(data.load("parquet", repo, 9), data.load("parquet", repo, 9, stream=True))
    same(data.load("parquet", repo, 8, stream=True), first)
    content[at] ^= 1
    assert kept.read_bytes() == content


def test_what_is_wrong_with_parquet_files_is_told(tree, rows, repo, monkeypatch, script):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = repo / "data" / "train-00000-of-00002.parquet"

    def told(message, where=repo):
        with pytest.raises(UserError, match=message) as error:
            data.load("parquet", where, 8)
        assert "\n" not in str(error.value)

    whole = path.read_bytes()
    for table, message in (
        ({"label": [1]}, "no column of images, image or img; there are label"),
        ({"image": [b""]}, "no column of labels, label or fine_label; there are image"),
        ({"image": [[1, 2]], "label": [1]}, "image holds no encoded images, but list<"),
        ({"image": [b""], "label": [0.5]}, "0.5 in column label is no class"),
    ):
        pq.write_table(pa.table(table), path)
        told(message)
    image, label = [b"x"], pa.array([1])
    names = {b"huggingface": b'{"info": {"features": {"label": {"names": 5}}}}'}
    for column, metadata, message in (
        (pa.array([image], pa.list_(pa.binary())), None, "image holds no encoded images, but list<"),
        (pa.array([{"data": b"x"}], pa.struct([("data", pa.binary())])), None, "no encoded images, but struct<"),
        (
            pa.array([{"bytes": image}], pa.struct([("bytes", pa.list_(pa.binary()))])),
            None,
            "no encoded images, but list<",
        ),
        (pa.array([[("k", b"x")]], pa.map_(pa.string(), pa.binary())), None, "no encoded images, but map<"),
        (pa.array(["x"]), None, "no encoded images, but string"),
        (pa.array(image), names, "names of the classes of column label are no list of names"),
    ):
        pq.write_table(pa.table({"image": column, "label": label}).replace_schema_metadata(metadata), path)
        told(message)
    path.write_bytes(whole[:-20])
    told("cannot read .*train-00000-of-00002.parquet: .*; mend or remove it")
    middle = whole[:200] + bytes(200) + whole[400:]
    path.write_bytes(middle)
    told("cannot read .*train-00000-of-00002.parquet")
    path.write_bytes(whole)
    told("holds no parquet files; it must hold train-", tree)
    shutil.copytree(repo / "data", repo / "more")
    told("holds several data sets: data, more; give one of them")
    told("more.parquet does not tell what it is for", shutil.move(path, repo / "data" / "more.parquet").parent)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    args = ["--model_job", "student", "--dataset", "parquet", "--data_dir", repo / "data"]
    refused(script("train.py", *args), "--dataset parquet needs pyarrow; pip install pyarrow")


# unequal classes, unreadable images


def test_unequal_classes_are_told(tree, capfd):
    for k in range(3, 9):
        shutil.copy(tree / "train" / "dog" / "0.png", tree / "train" / "dog" / f"{k}.png")
    data.load("folder", tree, 8)
    assert capfd.readouterr().err == ""  # three times as many are not told of
    shutil.copy(tree / "train" / "dog" / "0.png", tree / "train" / "dog" / "9.png")
    data.load("folder", tree, 8)
    assert capfd.readouterr().err == "unequal classes: train has 3 of cat, but 10 of dog\n"


@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_images_are_left_out(tree, stream, capfd, monkeypatch):
    expected = data.load("folder", shutil.copytree(tree, tree.parent / "copy"), 8)
    bad = [tree / "train" / "cat" / "1b.png", tree / "test" / "dog" / "0a.png"]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="2 images can't be read"):
        data.load("folder", tree, 8, stream)
    capfd.readouterr()
    for _ in range(2):
        given = data.load("folder", tree, 8, stream, skip_unreadable=True)
        same(given, expected)
        assert len(given.test.labels) == 4
        told = f"2 of 12 images left out, which can't be read: {bad[0]}, {bad[1]}\n"
        assert capfd.readouterr().err == told
        monkeypatch.setattr(folders, "read_image", lambda *args: pytest.fail("decoded again"))  # both are kept


def test_which_images_are_unreadable_is_asked_anew_where_the_note_was_changed(tree):
    (tree / "train" / "cat" / "1.png").write_bytes(b"no image")
    first = data.load("folder", tree, 8, skip_unreadable=True)
    kept = tree / ".unreadable_8.json"
    kept.write_text(kept.read_text().replace("  1\n", "  0\n"))
    same(data.load("folder", tree, 8, skip_unreadable=True), first)


def test_a_class_of_unreadable_images_alone_is_refused(tree, script):
    for k in range(3):
        (tree / "train" / "cat" / f"{k}.png").write_bytes(b"")
    args = ["--model_job", "student", "--dataset", "folder", "--data_dir", tree, "--image_size", 8]
    refused(script("train.py", *args, "--epochs", 1, "--skip_unreadable"), "no image of train can be read of cat; mend")


def test_a_data_set_in_one_piece_has_no_unreadable_images(script):
    refused(
        script("train.py", "--model_job", "student", "--dataset", "digits", "--epochs", 1, "--skip_unreadable"),
        "digits comes whole",
    )
