"""Results to tables and plots: the JSON of each run in; RESULTS.md, results.csv, top1.png and curves.png out.

Runs of a suite make SUITE.md and its plots.
"""

import importlib
from pathlib import Path

from report import plots, results, suite, table
from util import files
from util.runtime import UserError, say

NEEDED = ["matplotlib", "scipy"]  # imported where they are used, so that the scripts start fast


def require() -> None:
    """Find out, before anything is computed, whether the report's packages are there. Raises UserError."""
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        packages = " and ".join(missing)
        raise UserError(f"the table and the plots need {packages}, not installed: pip install -r requirements.txt")


def write(results_dir: Path, with_claims: bool = False) -> list[Path]:
    """Write the tables and the plots beside the runs' JSONs; give their paths.

    results.csv: every run. RESULTS.md, top1.png and curves.png: those of no suite, where there are any. Where there are
    suites with a student SUITE.md, and of each <suite>_schedules.png where losses have several schedules, else
    <suite>_cost.png or, where no cost is known, <suite>_top1.png.
    with_claims: with what the runs say of each of the reference's claims.
    Raises UserError where there is no run, where some are damaged, where two are not of the same data, or where a
    package is missing.
    """
    require()
    rows = results.read(results_dir)
    suites, others = [found for found in suite.suites_of(rows) if found.students], rows.of_no_suite()
    if with_claims and not others:
        raise UserError(
            f"{results_dir} holds runs of suites alone, which tell nothing of the claims; leave --claims off"
        )
    contents = {}
    if others:
        contents["RESULTS.md"] = table.markdown(others, with_claims).encode()
    contents["results.csv"] = table.comma_separated(rows).encode()
    if others:
        contents |= {"top1.png": plots.top1_plot(others), "curves.png": plots.curves_plot(others)}
    if suites:
        contents["SUITE.md"] = suite.markdown(suites).encode()
    for found in suites:
        contents[found.plot] = plots.suite_plot(found)
    with files.replacing_all([results_dir / name for name in contents]) as opened:
        for file, content in zip(opened, contents.values(), strict=True):
            file.write(content)
    return [results_dir / name for name in contents]


def try_write(results_dir: Path) -> list[Path]:
    """`write`, for a `finally`: what is wrong is said in a line, and nothing is raised in place of another exception.

    Where there is no result yet, nothing is written and nothing said.
    """
    if not any(results_dir.glob(results.NAMES)):
        return []
    try:
        return write(results_dir)
    except UserError as error:
        say(f"no table and no plots: {error}")
        return []
