"""Images listed in a table: a CSV that names files, or parquet files of the Hugging Face hub's shape that hold them."""

import csv
import io
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from images.folders import TEST, TRAIN, Found, class_name, say_untested, some
from images.packed import Packed, Row
from util import files, parsed
from util.files import Stamp
from util.runtime import UserError, say
from util.text import printable

COLUMNS = ("path", "label", "split")
DELIMITERS = ",;\t"
SHAPE = "train-*.parquet and test-*.parquet"

Parts = dict[
    str, list[tuple[Path | Row, str | None]]
]  # by the split's name: each image, and its class where it has one


# CSV


def find_csv(data_dir: Path, classes: Collection[str] | None = None) -> Found:
    """The images that a CSV names: data_dir itself, or the only one in it, with the columns path, label and split.

    Paths are relative to the CSV's folder; split is one of the names that folders may have, train, test, val, ...
    classes: as in images.find. Raises UserError for what is missing or in doubt, naming the line.
    """
    path = _the_csv(data_dir)
    parts, lines = {}, {}
    for line, (name, label, split) in _rows(path):
        where = f"{printable(path)}, line {line}"
        if not name or not label:
            raise UserError(f"{where} has no {'label' if name else 'path'}")
        if "://" in name:
            raise UserError(f"{where}: {printable(name)} is no file; download the images and give their paths")
        if split.casefold() not in TRAIN + TEST:
            raise UserError(f"{where}: its split is {printable(split) or 'empty'}; it must be train, test or val")
        image = path.parent / name
        lines.setdefault(image, line)
        parts.setdefault(split.casefold(), []).append((image, class_name(label)))
    _refuse_missing(path, lines)
    listing = _chosen(printable(path), parts, classes)
    _say_repeated(listing)
    _say_in_both(listing)
    return Found(
        path.parent, listing, _in_order({label for found in listing.values() for _, label in found}), path.name
    )


def _the_csv(data_dir: Path) -> Path:
    if not data_dir.is_dir():
        if not data_dir.is_file():
            raise UserError(f"--data_dir {printable(data_dir)} is not there; give a CSV file, or the folder of one")
        return data_dir
    found = sorted(path for path in data_dir.iterdir() if path.suffix.lower() == ".csv" and path.name[0] != ".")
    if len(found) != 1:
        told = f"several CSV files: {some([path.name for path in found])}" if found else "no CSV file"
        raise UserError(f"{printable(data_dir)} holds {told}; give the file: --data_dir FILE.csv")
    return found[0]


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of each row's last line, and what its COLUMNS hold."""
    try:
        files.ensure_regular(path)
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{printable(path)} is not in UTF-8; save it as UTF-8 (a spreadsheet: CSV UTF-8)") from None
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            header = [name.strip().casefold() for name in next(reader, [])]
            if set(COLUMNS) <= set(header):
                yield from _cells(path, reader, header)
                return
        except csv.Error as error:
            raise UserError(f"{printable(path)}, line {reader.line_num}: {error}") from None
    first = printable(text.partition("\n")[0].strip()[:80]) or "empty"
    raise UserError(
        f"{printable(path)}: the first line must name the columns path, label and split, with commas, semicolons or "
        f"tabs between them; it is {first}"
    )


def _cells(path: Path, reader: Iterator[list[str]], header: list[str]) -> Iterator[tuple[int, list[str]]]:
    columns = [header.index(name) for name in COLUMNS]
    for cells in reader:
        if not any(map(str.strip, cells)):
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{printable(path)}, line {reader.line_num} has {len(cells)} cells, the first line {len(header)}"
            )
        yield reader.line_num, [cells[column].strip() for column in columns]


def _refuse_missing(table: Path, lines: dict[Path, int]) -> None:
    missing = [path for path in lines if not os.path.isfile(path)]
    if missing:
        first = missing[0]
        raise UserError(
            f"{printable(table)}: {len(missing):,} of {len(lines):,} files are not there; the first, in line "
            f"{lines[first]}, is {printable(first)}"
        )


def _say_repeated(listing: Parts) -> None:
    for part, images in listing.items():
        labels: dict[str, list] = {}
        for path, label in images:
            labels.setdefault(os.path.normpath(path), []).append(label)
        contradicted = sorted(path for path, given in labels.items() if len({*given}) > 1)
        repeated = sorted(path for path, given in labels.items() if len(given) > len({*given}))
        if contradicted:
            say(f"in {part} under more than one label: {some(contradicted)}")
        if repeated:
            say(f"in {part} more than once: {some(repeated)}")


def _say_in_both(listing: Parts) -> None:
    own = {os.path.normpath(path) for path, _ in listing.get("train", ())}
    both = sorted({os.path.normpath(path) for path, _ in listing["test"]} & own)
    if both:
        say(f"in train and test alike: {some(both)}; the test's figures are flattered")


# parquet


def find_parquet(data_dir: Path, classes: Collection[str] | None = None) -> Found:
    """The images of parquet files as the Hugging Face hub has them: train-*.parquet, test-*.parquet, validation-*.

    data_dir: their folder, or one above it; or one file with a column `split`; or, for a network of these classes to be
    tested, any file. The columns: image (or img), encoded images, as bytes or a struct that has them; label (or
    fine_label), numbers, with names in the schema's metadata, or text.
    Raises UserError for what is missing or in doubt, and where pyarrow is not installed.
    """
    parts, orders = {}, {}
    for path in _parquet_files(data_dir):
        with _reading(path):
            stamp = Stamp.of(path)
            table = _open(path)
            labels, splits = table.labels(), table.splits()
        named = (
            None if data_dir.is_file() and splits else "test" if data_dir.is_file() and classes else _part_named(path)
        )
        if not named and splits is None:
            raise UserError(
                f"{printable(path)} does not tell what it is for; name it train-... or test-..., or add a column split"
            )
        images = Packed(path, table.images, stamp)
        for number, (label, split) in enumerate(zip(labels, [named] * len(labels) if named else splits, strict=True)):
            if str(split).casefold() not in TRAIN + TEST:
                raise UserError(
                    f"{printable(path)}[{number}]: its split is {printable(str(split))}; it must be train, test or val"
                )
            parts.setdefault(str(split).casefold(), []).append((Row(images, number), label))
        orders.update(dict.fromkeys(table.classes or ()))
    if data_dir.is_file() and not classes and not parts.keys() & {*TRAIN}:
        raise UserError(f"{printable(data_dir)} holds no images to train on; give the folder of {SHAPE}")
    listing = _chosen(printable(data_dir), parts, classes)
    own = {label for found in listing.values() for _, label in found}
    root, name = (data_dir, "parquet") if data_dir.is_dir() else (data_dir.parent, data_dir.name)
    return Found(root, listing, tuple(orders) if own <= orders.keys() else _in_order(own), name)


def _parquet_files(data_dir: Path) -> list[Path]:
    if data_dir.is_file():
        return [data_dir]
    found = sorted(path for below in ("", "*/", "*/*/") for path in data_dir.glob(f"{below}*.parquet"))
    found = [path for path in found if not any(name[0] == "." for name in path.relative_to(data_dir).parts)]
    if not found:
        raise UserError(f"{printable(data_dir)} holds no parquet files; it must hold {SHAPE}, there or below")
    homes = sorted({path.parent.parent if _words(path.parent.name) else path.parent for path in found})
    if len(homes) > 1:
        names = some([os.path.relpath(home, data_dir) for home in homes])
        raise UserError(f"{printable(data_dir)} holds several data sets: {names}; give one of them")
    return found


def _words(name: str) -> set[str]:
    """Those of its words that name a part of a data set."""
    return {*re.findall("[a-z]+", name.casefold())} & {*TRAIN, *TEST}


def _part_named(path: Path) -> str | None:
    """The part that the file's name, or else its folder's, tells."""
    words = _words(path.stem) or _words(path.parent.name)
    return words.pop() if len(words) == 1 else None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says what pyarrow could not read. Raises UserError for it."""
    pyarrow = _pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        reason = printable(str(error)).partition("\\n")[0]
        raise UserError(f"cannot read {printable(path)}: {reason}; mend or remove it") from None


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # optional: only parquet needs it
    except ImportError:
        raise UserError("--dataset parquet needs pyarrow; pip install pyarrow") from None
    return pyarrow


class _Table(NamedTuple):
    """A parquet file. classes: of the numbers in its label column, where its metadata names them."""

    path: Path
    file: Any
    image: str
    label: str
    classes: list[str] | None

    def images(self) -> Iterator[bytes]:
        """Each row's encoded image, empty where there is none."""
        with _reading(self.path):
            for batch in self.file.iter_batches(batch_size=256, columns=[self.image]):
                for cell in batch.column(0).to_pylist():
                    yield (cell["bytes"] if isinstance(cell, dict) else cell) or b""

    def labels(self) -> list[str | None]:
        """Each row's class, None where there is none."""
        return [self._class(value) for value in self._column(self.label)]

    def splits(self) -> list[str] | None:
        """What each row is for, where there is such a column."""
        return self._column("split") if "split" in self.file.schema_arrow.names else None

    def _column(self, name: str) -> list[Any]:
        return self.file.read(columns=[name]).column(0).to_pylist()

    def _class(self, value: Any) -> str | None:
        if isinstance(value, str):
            return class_name(value.strip()) or None
        if value is None or value == -1:  # so the hub marks images without a label
            return None
        if not isinstance(value, int) or (self.classes and not 0 <= value < len(self.classes)):
            raise UserError(f"{printable(self.path)}: {printable(str(value))[:80]} in column {self.label} is no class")
        return self.classes[value] if self.classes else str(value)


def _open(path: Path) -> _Table:
    files.ensure_regular(path)
    file = _pyarrow().parquet.ParquetFile(_pyarrow().OSFile(os.fsencode(path)))
    schema = file.schema_arrow
    features = _features(schema.metadata)
    image = _column_of("images", path, schema, features, ("image", "img"), "Image")
    label = _column_of("labels", path, schema, features, ("label", "fine_label", "labels"), "ClassLabel")
    kind = schema.field(image).type
    holds = image
    if _pyarrow().types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, holds = kind.field("bytes").type, f"{image}.bytes"
    if not re.fullmatch(r"(large_)?binary(_view)?|fixed_size_binary.*|dictionary<values=binary,.*", str(kind)):
        raise UserError(f"{printable(path)}: column {image} holds no encoded images, but {printable(str(kind))[:80]}")
    names = features.get(label, {}).get("names")
    if names is not None and not parsed.list_of(parsed.text)(names):
        raise UserError(f"{printable(path)}: the names of the classes of column {label} are no list of names")
    return _Table(path, file, holds, label, [class_name(name) for name in names] if names else None)


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What the hub's library says of the columns; nothing where another one wrote the file."""
    try:
        features = parsed.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _column_of(
    what: str, path: Path, schema: Any, features: dict[str, dict[str, Any]], names: tuple[str, ...], kind: str
) -> str:
    """The column of one of these names, else the only one that is said to be of this kind."""
    told = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    found = [name for name in names if name in schema.names] or (told if len(told) == 1 else [])
    if not found:
        raise UserError(
            f"{printable(path)} has no column of {what}, {' or '.join(names[:2])}; there are {some(schema.names)}"
        )
    return found[0]


# both


def _chosen(where: str, parts: Parts, classes: Collection[str] | None) -> Parts:
    """The images of "train" and "test", each of a class. Raises UserError where there are none, or of other classes."""
    listing = {"train": found} if (found := [image for name in TRAIN for image in parts.get(name, ())]) else {}
    if not listing and not classes:
        raise UserError(f"{where}: no image's split is train")
    named = [name for name in TEST if name in parts]
    test = next((name for name in named if any(label is not None for _, label in parts[name])), None)
    if test is None:
        raise UserError(f"{where}: no image with a label has the split test, or val")
    listing["test"] = parts[test]
    for name, found in listing.items():
        if bare := [image for image, label in found if label is None]:
            raise UserError(f"{where}: {len(bare):,} images of {name} have no label: {some(bare)}")
    for name in named:
        if name != test:
            say(f"{where}: split {name} is not used, {test} is")
    own, tested = ({label for _, label in listing.get(name, ())} for name in ("train", "test"))
    if unknown := sorted(tested - set(classes or own)):
        reason = "that the network does not know" if classes else "that are not in train"
        raise UserError(f"{where}: classes in {test} {reason}: {some(unknown)}")
    say_untested(set(classes or own), tested)
    return listing


def _in_order(classes: Collection[str]) -> tuple[str, ...]:
    """Sorted; numbers as numbers."""
    numbers = all(re.fullmatch("[0-9]+", name, re.ASCII) for name in classes)
    return tuple(sorted(classes, key=lambda name: (int(name), name) if numbers else (0, name)))
