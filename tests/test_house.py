"""The directions of DESIGN: what may import what."""

import ast

from conftest import ROOT

SCRIPTS = {"train", "train_distillation", "test", "test_LDH", "reproduce"}
OURS = {path.stem for path in ROOT.glob("*.py")} | {"util", "report"}


def imported(path):
    """The project's modules and packages that the file imports, by their first names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & OURS


def test_util_knows_nothing_of_the_rest():
    files = list((ROOT / "util").glob("*.py"))
    assert len(files) > 5 and all(imported(path) <= {"util"} for path in files)


def test_the_report_knows_recipes_and_util_alone():
    files = list((ROOT / "report").glob("*.py"))
    assert files and all(imported(path) <= {"recipes", "util", "report"} for path in files)


def test_nothing_imports_a_script():
    for folder in (".", "util", "report"):
        for path in (ROOT / folder).glob("*.py"):
            allowed = {"test"} if path.name == "test_LDH.py" else set()
            assert imported(path) & SCRIPTS <= allowed, path


def test_the_science_knows_no_machinery_of_runs():
    """Losses, recipes and networks stand below the jobs and the command line."""
    for name in ("losses", "recipes", "models"):
        assert imported(ROOT / f"{name}.py") <= {"models", "recipes", "util"}, name
