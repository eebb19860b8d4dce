"""What lies on the disk for a run, by the mode of the run: every cell, and a death at every moment."""

import itertools
import json
import shutil
from contextlib import contextmanager

import pytest
from as_processes import Started, thin
from test_runstate import wait_until
from test_scripts import refused

import checkpoint
import cli
import jobs
from report.results import Result
from util.runstate import Keeper

RUN = ["train.py", "--model_job", "student", "--batch_size", 20]
MODES = {"new": [], "resume": ["--resume"], "overwrite": ["--overwrite"]}
UNFINISHED, OTHER = "is the state of a run that was not finished", "comes from other settings (recipe.learning_rate"


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch):
    thin(monkeypatch.setattr)


@pytest.fixture
def train(script, small, monkeypatch):
    """Run the student's training with the flags; torchrun: by the one of that name, restarted so often."""

    def run(*flags, torchrun=None, restarts=0):
        with monkeypatch.context() as patched:
            if torchrun:
                patched.setenv("TORCHELASTIC_RUN_ID", torchrun)
                patched.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
            return script(*RUN, *small, *flags)

    return run


@contextmanager
def dies(owner, name, after=0):
    """Here a run dies as it calls the owner's function, after so many calls of it."""
    kept, calls = getattr(owner, name), itertools.count()

    def die(*args, **options):
        if next(calls) == after:
            raise SystemExit(9)  # which no part of a run catches
        return kept(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, die)
        yield


def result_of(tmp_path):
    return json.loads((tmp_path / "results" / "folder" / "student_seed0.json").read_text())


def files_in(tmp_path):
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def lie(train, what, *flags, **torchrun):
    """Let that lie on the disk for the run of two epochs."""
    if what == "unfinished":
        with dies(Keeper, "save", after=1):
            assert train("--epochs", 2, *flags, **torchrun).code == 9
    if what in ("finished", "another's"):
        assert train("--epochs", 2, *flags, *["--learning_rate", 0.1] * (what == "another's"), **torchrun).code == 0


def check(ran, does, before, tmp_path):
    """That the run starts, goes on, prints its figures, or is refused with these words, and what is there then."""
    if does not in ("starts", "goes on", "prints it"):
        refused(ran, does)
        assert files_in(tmp_path) == before
        return
    assert ran.code == 0, ran.err
    assert ran.out.count("Epoch") == {"starts": 2, "goes on": 1, "prints it": 0}[does]
    assert ("finished already" in ran.err) == (does == "prints it")
    result = result_of(tmp_path)
    assert len(result["epochs"]) == 2 and result["recipe"]["learning_rate"] == 0.001
    assert not list(tmp_path.rglob("*.state*")) and not list(tmp_path.rglob(".*"))


ON_DISK = [
    # what lies there, and what a run does in the mode new, resume, overwrite, and restarted by torchrun
    ("nothing", "starts", "starts", "starts", "starts"),
    ("unfinished", UNFINISHED, "goes on", "starts", "goes on"),
    ("finished", "prints it", "prints it", "starts", "prints it"),
    ("another's", OTHER, OTHER, "starts", OTHER),
]
CELLS = [(row[0], mode, does) for row in ON_DISK for mode, does in zip([*MODES, "restarted"], row[1:], strict=True)]


@pytest.mark.parametrize("what, mode, does", CELLS)
def test_each_cell(train, tmp_path, what, mode, does):
    torchrun = {"torchrun": "one"} if mode == "restarted" else {}
    lie(train, what, **torchrun)
    before = files_in(tmp_path)
    ran = train("--epochs", 2, *MODES.get(mode, []), **torchrun, restarts=1)
    check(ran, does, before, tmp_path)


RESTARTS = [
    # what lies there, its torchrun and its mode; the mode of the run that the torchrun "one" restarts, what that does
    ("unfinished", "other", "new", "new", UNFINISHED),
    ("unfinished", "other", "new", "resume", "goes on"),
    ("unfinished", "one", "overwrite", "overwrite", "goes on"),
    ("unfinished", "other", "overwrite", "overwrite", "starts"),
    ("finished", "one", "overwrite", "overwrite", "prints it"),
    ("finished", "other", "overwrite", "overwrite", "starts"),
    ("finished", None, "new", "overwrite", "starts"),
    ("another's", "other", "new", "overwrite", "starts"),
    ("another's", "other", "new", "resume", OTHER),
]


@pytest.mark.parametrize("what, torchrun, its_mode, mode, does", RESTARTS)
def test_a_restarted_run_knows_what_its_torchrun_began(train, tmp_path, what, torchrun, its_mode, mode, does):
    lie(train, what, *MODES[its_mode], torchrun=torchrun)
    before = files_in(tmp_path)
    check(train("--epochs", 2, *MODES[mode], torchrun="one", restarts=1), does, before, tmp_path)


MOMENTS = {
    "before the first state": (Keeper, "save"),
    "between two states": (Keeper, "save", 1),
    "before the checkpoint": (checkpoint, "save"),
    "between checkpoint and result": (jobs, "_write_result"),
    "between the CSV and the result": (Result, "write"),
    "before the state is removed": (Keeper, "finish"),
    "when all is done": (cli.processes, "leave"),
}
BEGUN, EXPECTED = {}, {}  # of each way to begin: the files that lie there, and what an undisturbed run's result tells


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("mode", ["new", "overwrite", "extend"])
def test_a_run_that_dies_at_any_moment_goes_on(train, tmp_path, mode, moment):
    """By hand, with --resume where a state is there, and restarted by torchrun: as if nothing had been."""
    flags = ["--epochs", 3, *MODES["resume" if mode == "extend" else mode]]
    earlier = ["--epochs", 1] * (mode != "new")

    def begin():
        for folder in ("checkpoints", "results"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        if mode not in BEGUN:
            assert not earlier or train(*earlier).code == 0
            BEGUN[mode] = {path.relative_to(tmp_path): content for path, content in files_in(tmp_path).items()}
        for path, content in BEGUN[mode].items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)

    def told():
        result = result_of(tmp_path)
        losses = [epoch["train_loss"] for epoch in result["epochs"]]
        return losses, result["checkpoint_sha256"], result["warm_start"], result["recipe"], result["test"]

    if mode not in EXPECTED:
        begin()
        assert train(*flags).code == 0
        EXPECTED[mode] = told()
    owner, name, *after = MOMENTS[moment]
    for again in ("by hand", "restarted"):
        begin()
        with dies(owner, name, *after):
            assert train(*flags, torchrun="one").code == 9
        if again == "restarted":
            ran = train(*flags, torchrun="one", restarts=1)
        else:
            there = list(tmp_path.rglob("*.state"))
            ran = train(*flags[:2], "--resume") if there or moment == "when all is done" else train(*flags)
        assert ran.code == 0, ran.err
        assert told() == EXPECTED[mode]
        assert not list(tmp_path.rglob("*.state*")) and not list(tmp_path.rglob(".*"))


def test_reproduce_reads_the_disk_in_the_same_way(train, script, small, tmp_path):
    """It goes on with its row's unfinished run, and refuses one that was trained on from fewer epochs."""
    row = ["reproduce.py", *small, "--batch_size", 20, "--epochs", 2, "--scheduler_step", 20, "--jobs", "student"]
    lie(train, "unfinished")
    ran = script(*row)
    assert ran.code == 0 and ran.out.count("Epoch") == 1, ran.err
    with dies(Keeper, "save", after=1):
        assert train("--epochs", 4, "--resume").code == 9
    row[row.index("--epochs") + 1] = 4
    for _ in ("unfinished", "finished"):
        before = files_in(tmp_path)
        ran = script(*row)
        assert ran.code == 2 and "warm_start from another" in ran.err and "Epoch" not in ran.out
        assert files_in(tmp_path) == before
        assert train("--epochs", 4, "--resume").code == 0


# two runs at once


@pytest.mark.parametrize("folder, words", [("--checkpoint_dir", "student_seed0"), ("--results_dir", "resnet18")])
def test_a_second_run_of_the_same_files_is_refused(train, small, tmp_path, folder, words):
    """One folder is its own; in the other it would write the same file."""
    running = Started(*RUN, *small, "--epochs", 100000, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.rglob("*.state")), running)
    refused(train("--epochs", 1, folder, tmp_path / "own"), f"{words} is being made", f"process {running.pid} on")


@pytest.mark.parametrize("name", ["checkpoint", "result"])
def test_what_another_run_wrote_meanwhile_is_not_replaced(train, tmp_path, monkeypatch, name):
    """As it can where the file system has no locks."""
    assert train("--epochs", 1, "--learning_rate", 0.1, "--name", "other").code == 0
    find = {
        "checkpoint": lambda: next(tmp_path.rglob("other.pth")),
        "result": lambda: next(tmp_path.rglob("other_*.json")),
    }
    place = {"checkpoint": "resnet18.pth", "result": "student_seed0.json"}[name]
    evaluate = jobs.evaluate

    def meanwhile(*args):
        shutil.copy(find[name](), find[name]().with_name(place))
        return evaluate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "evaluate", meanwhile)
        ran = train("--epochs", 1)
    there = find[name]().with_name(place)
    assert ran.code == 2 and f"another run has written {there.relative_to(tmp_path)}" in ran.err, ran.err
    assert "the training is kept" in ran.err and there.read_bytes() == find[name]().read_bytes()
    assert train("--epochs", 1, "--resume").code == 2 and there.read_bytes() == find[name]().read_bytes()
    there.unlink()
    ran = train("--epochs", 1, "--resume")
    assert ran.code == 0 and "Epoch" not in ran.out and result_of(tmp_path)["recipe"]["learning_rate"] == 0.001


def test_a_checkpoint_that_was_trained_on_is_no_run_of_its_row(train, tmp_path):
    """Its result, which tells so as well, is gone."""
    assert train("--epochs", 1).code == 0 and train("--epochs", 2, "--resume").code == 0
    next(tmp_path.rglob("student_seed0.json")).unlink()
    refused(train("--epochs", 2), "was trained on from a finished run of 1 epochs", "--overwrite")
