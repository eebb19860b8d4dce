"""The house: what may import what, so that there is one direction and no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
MAY_IMPORT = {
    "util": {"util"},
    "images": {"images", "util"},
    "report": {"report", "recipes", "util"},
    "zoo": {"zoo", "losses", "outputs", "recipes", "util"},
    "tools": OURS - SCRIPTS,
}
MODULES = [*ROOT.glob("*.py"), *(path for folder in MAY_IMPORT for path in ROOT.glob(f"{folder}/**/*.py"))]


def imported(path: Path) -> Iterator[str]:
    """The top-level names of what the file imports, in functions too."""
    folder = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Of relative imports, those of a package stay within it; no file lies deep enough for others.
            yield folder if node.level else node.module.partition(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_package_imports_nothing_from_above(folder):
    wrong = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in ROOT.glob(f"{folder}/**/*.py")
        for name in imported(path)
        if name in OURS - MAY_IMPORT[folder]
    }
    assert not wrong


def test_nothing_imports_a_script():
    assert {"train", "train_distillation", "test", "test_LDH", "reproduce", "compare"} <= SCRIPTS
    wrong = {(path.name, name) for path in MODULES for name in imported(path) if name in SCRIPTS}
    assert wrong <= {("test_LDH.py", "test")}  # the same script, with another default


SCIENCE = {"losses", "recipes", "models", "outputs"}


@pytest.mark.parametrize("name", sorted(SCIENCE))
def test_the_science_stands_below_the_jobs_and_the_flags(name):
    assert set(imported(ROOT / f"{name}.py")) & OURS <= {*SCIENCE, "util", "zoo"}


def test_only_suites_know_all_losses():
    """A file of zoo/ with losses or networks is below losses.py, which gathers them."""
    knowing = {path.name for path in ROOT.glob("zoo/*.py") if "losses" in imported(path)}
    assert knowing == {"suites.py"}


def test_only_scripts_import_tools():
    importers = {path.relative_to(ROOT).as_posix() for path in MODULES if "tools" in imported(path)}
    assert {name for name in importers if "/" not in name} <= {f"{name}.py" for name in SCRIPTS}
    assert not [name for name in importers if "/" in name and not name.startswith("tools/")]
