"""Runs that die and go on: exactly, and never over another's work."""

import contextlib
import errno
import functools
import os
import random
import re
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from as_processes import FORKS, Started, thin
from test_scripts import EPOCH, refused

import models
from report.results import Result
from util import environment, files, runstate
from util.runtime import Stopped, UserError

# Big enough that a run can be hit in the middle of an epoch: 40 images, 5 batches an epoch.
RUN = ["--epochs", 8, "--batch_size", 8, "--scheduler_step", 3]


@pytest.fixture
def process(tmp_path):
    return functools.partial(Started, cwd=tmp_path)


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch):
    thin(monkeypatch.setattr)


@pytest.fixture
def folder(tmp_path, scaled_like_trained):
    path = tmp_path / "checkpoints"
    path.mkdir()
    torch.manual_seed(5)
    torch.save(scaled_like_trained(models.build("teacher", 4)).state_dict(), path / "resnet50.pth")
    return path


def undisturbed(process, args, path):
    """The bytes of the checkpoint of a run that nothing disturbs."""
    running = process(*args)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    content = path.read_bytes()
    path.unlink()
    return content, out


@pytest.mark.parametrize(
    "script_and_job, name",
    [
        (["train.py", "--model_job", "student"], "resnet18"),
        (["train_distillation.py", "--model_job", "distillation_LDH9", "--augment"], "Distilled_resnet18_LDH9"),
    ],
)
def test_killed_at_random_and_resumed_the_weights_are_the_same(process, small, folder, script_and_job, name):
    args = [*script_and_job, *small, "--checkpoint_dir", folder, *RUN]
    expected, printed = undisturbed(process, args, folder / f"{name}.pth")
    generator, kills, lines = random.Random(7), 0, []
    for _ in range(40):
        running = process(*args, "--resume")
        if kills < 4:
            lines.append(running.stdout.readline())  # its start and at least an epoch
            time.sleep(generator.random() * 0.3)
            running.kill()
            kills += 1
        out, err = running.communicate(timeout=120)
        lines += out.splitlines(keepends=True)
        if running.returncode == 0:
            break
    assert running.returncode == 0, err
    assert (folder / f"{name}.pth").read_bytes() == expected
    losses = dict(re.findall(r"Epoch \[(\d+)/8\], Train Loss: (\S+)", "".join(lines)))
    assert losses == dict(re.findall(r"Epoch \[(\d+)/8\], Train Loss: (\S+)", printed))
    assert not list(folder.glob("*.state*")) and not list(folder.glob("*.tmp"))


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_stops_in_mid_epoch(process, small, folder, number, code):
    args = ["train.py", "--model_job", "student", *small, "--checkpoint_dir", folder, "--batch_size", 2, "--epochs", 6]
    expected, _ = undisturbed(process, args, folder / "resnet18.pth")
    running = process(*args, "--overwrite")
    assert re.match(EPOCH, running.stdout.readline())
    time.sleep(0.05)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert "go on with: python" in err and "--resume" in err and "Traceback" not in err
    assert err.count("stopping after this batch") == 1
    state = runstate.load(folder / "resnet18.state")
    assert state["position"]["epoch"] >= 1 and state["position"]["iteration"] > 0
    assert not (folder / "resnet18.pth").exists()
    running = process(*args, "--resume")
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert (folder / "resnet18.pth").read_bytes() == expected
    assert out.count("Epoch") == 6 - state["position"]["epoch"]


ENDLESS = ["--model_job", "student", "--epochs", 100000, "--batch_size", 8]


@pytest.mark.parametrize("changes", ["thin", "thin,nohup"])
def test_a_terminal_that_hangs_up_costs_nothing(process, small, folder, changes):
    """Its stdout and stderr are gone, then SIGHUP comes, twice; with nohup it is not to stop for that."""
    running = process("train.py", *small, "--checkpoint_dir", folder, *ENDLESS, changes=changes, together=True)
    running.stdout.readline()
    running.stdout.close()
    hang_up(running, folder)
    if "nohup" in changes:
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
    running.join()
    assert running.returncode == (143 if "nohup" in changes else 129)
    assert runstate.load(folder / "resnet18.state")["figures"]


def hang_up(running, folder):
    """Two SIGHUPs, further apart than a user's one wish, and some epochs after them."""
    for _ in range(2):
        running.send_signal(signal.SIGHUP)
        time.sleep(1.2 * runstate.ONE_WISH)
        if running.poll() is not None:
            return
    seen = set()  # states, of which there is none for a moment between two renames
    wait_until(lambda: seen.add((folder / "resnet18.state").stat().st_ino) or len(seen) > 1, running)


def wait_until(true, running):
    """For 60 seconds at most."""
    for _ in range(6000):
        with contextlib.suppress(FileNotFoundError):
            if true():
                return
        assert running.poll() is None
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.fixture
def stopped(script, small, folder, monkeypatch):
    """A run that was stopped after its first epoch: its arguments."""
    args = ["--model_job", "student", *small, "--checkpoint_dir", folder, *RUN]
    save = runstate.Keeper.save

    def stop(self, state):
        self.stop = signal.SIGTERM
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(runstate.Keeper, "save", stop)
        assert script("train.py", *args).code == 143
    return args


def test_a_state_is_not_silently_overwritten(script, stopped, folder):
    before = (folder / "resnet18.state").read_bytes()
    refused(script("train.py", *stopped), "resnet18.state", "--resume", "--overwrite")
    assert (folder / "resnet18.state").read_bytes() == before
    ran = script("train.py", *stopped, "--overwrite")
    assert ran.code == 0 and ran.out.count("Epoch") == 8


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--epochs", 7], "recipe.epochs: 8 there, 7 now"),
        (["--learning_rate", 0.01], "recipe.learning_rate"),
        (["--batch_size", 10], "recipe.batch_size"),
        (["--augment"], "augment"),
        (["--precision", "bf16"], "precision: fp32 there, bf16 now"),
    ],
)
def test_a_state_of_other_settings_is_refused(script, stopped, folder, flags, word):
    before = (folder / "resnet18.state").read_bytes()
    refused(script("train.py", *stopped, *flags, "--resume"), word, "--overwrite")
    assert (folder / "resnet18.state").read_bytes() == before


def test_an_unfinished_run_may_be_given_more_epochs(script, stopped, folder):
    """Exactly as if it had been asked for them at once, where no schedule of alpha depends on their number."""
    ran = script("train.py", *stopped, "--epochs", 9, "--resume")
    assert ran.code == 0 and [match[0] for match in re.findall(EPOCH, ran.out)] == [str(k) for k in range(2, 10)]
    resumed = torch.load(folder / "resnet18.pth", weights_only=True)
    assert script("train.py", *stopped, "--epochs", 9, "--overwrite").code == 0
    whole = torch.load(folder / "resnet18.pth", weights_only=True)
    assert all(value.equal(whole[key]) for key, value in resumed.items())


@pytest.mark.parametrize("older", [False, True])
def test_a_result_tells_what_each_stretch_ran_on(script, stopped, folder, monkeypatch, older):
    """Of an older state, which does not, how far it had come."""
    if older:
        state = runstate.load(folder / "resnet18.state")
        del state["stretches"]
        runstate.save(state, folder / "resnet18.state")
    monkeypatch.setattr(environment, "commit", lambda: ("feed", True))
    assert script("train.py", *stopped, "--resume").code == 0
    result = Result.read(folder.parent / "results" / "folder" / "student_seed0.json")
    first, second = result.stretches
    ends = ("from_epoch", "from_batch", "to_epoch", "to_batch")
    assert [first[end] for end in ends] == [0, 0, 1, 0] and [second[end] for end in ends] == [1, 0, 8, 0]
    assert (second["commit"], second["changed"]) == ("feed", True)
    assert second["versions"]["torch"] == torch.__version__ and not (second["graphs"] or second["compiled"])
    assert first.get("commit") != "feed" and first.get("device") == (None if older else result.device)


def test_resume_without_a_state_starts_and_then_is_done(script, small, folder):
    args = ["--model_job", "student", *small, "--checkpoint_dir", folder, "--epochs", 1, "--resume"]
    assert script("train.py", *args).out.count("Epoch") == 1
    ran = script("train.py", *args)
    assert ran.code == 0 and "finished already" in ran.err and ran.out.startswith("Test Loss")


def test_reproduce_goes_on_by_itself(process, small, folder):
    args = ["reproduce.py", *small, "--checkpoint_dir", folder, "--jobs", "student", "distillation", "--epochs", 6]
    args += ["--batch_size", 8]
    expected, _ = undisturbed(process, args, folder / "resnet18.pth")
    for path in [*folder.glob("D*.pth"), *(folder.parent / "results" / "folder").iterdir()]:
        path.unlink()
    running = process(*args)
    wait_until((folder / "resnet18.state").exists, running)
    running.kill()
    running.communicate()
    running = process(*args)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0 and "student: going on after" in err
    assert (folder / "resnet18.pth").read_bytes() == expected


def test_a_second_process_is_told_who_holds_the_run(process, script, small, folder):
    args = ["train.py", *small, "--checkpoint_dir", folder, *ENDLESS]
    running = process(*args)
    wait_until((folder / "resnet18.state").exists, running)
    refused(script(*args), f"process {running.pid} on")
    running.kill()
    running.communicate()
    refused(script(*args), "resnet18.state")  # the lock went with the process, its state did not


# files


@pytest.fixture
def state_file(tmp_path):
    path = tmp_path / "a.state"
    for epoch in (1, 2):
        state = {"network": {"w": torch.arange(50.0)}, "position": {"epoch": epoch}, "identity": {}, "figures": []}
        runstate.save(state, path)
    return path


def test_a_state_comes_back_and_so_does_the_one_before(state_file):
    assert runstate.load(state_file)["position"] == {"epoch": 2}
    assert runstate.load(runstate.previous(state_file))["position"] == {"epoch": 1}


def mutations(content, n):
    """The content with bits flipped, bytes lost, doubled or replaced, n times over."""
    generator = random.Random(0)
    for _ in range(n):
        mutant = bytearray(content)
        for _ in range(generator.choice([1, 1, 3, 50])):
            at, kind = generator.randrange(len(mutant)), generator.randrange(4)
            if kind == 0:
                mutant[at] ^= 1 << generator.randrange(8)
            elif kind == 1:
                del mutant[at : at + generator.choice([1, 10, 1000])]
            elif kind == 2:
                mutant[at:at] = mutant[at : at + generator.choice([1, 10, 1000])]
            else:
                mutant[at : at + 4] = generator.randbytes(4)
            if not mutant:
                break
        if mutant != content:
            yield bytes(mutant)


def test_a_damaged_state_is_refused_and_the_one_before_offered(state_file):
    content = state_file.read_bytes()
    for mutant in [b"", content[:-1], content + b"x", *mutations(content, 1000)]:
        state_file.write_bytes(mutant)
        with pytest.raises(UserError, match="a.state is damaged .* mv .*a.state.previous"):
            runstate.load(state_file)
    runstate.previous(state_file).unlink()
    with pytest.raises(UserError, match="--overwrite"):
        runstate.load(state_file)


def test_a_state_that_would_run_code_is_not_run(tmp_path, monkeypatch):
    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    runstate.save({"network": Touch()}, tmp_path / "a.state")
    with pytest.raises(UserError, match="a.state is damaged"):
        runstate.load(tmp_path / "a.state")
    assert not (tmp_path / "ran").exists()


def test_dying_between_two_renames_loses_nothing(state_file):
    os.replace(state_file, runstate.previous(state_file))
    keeper = runstate.Keeper(state_file, {})
    keeper.begin(runstate.find(state_file))
    assert state_file.exists() and keeper.state["position"] == {"epoch": 2}


@pytest.fixture
def failing(monkeypatch):
    """Let no file whose name holds a word get to the disk any more, as if that were full, or read-only."""
    fsync = os.fsync

    def start(word, number):
        def fail(handle):
            if word in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(number, os.strerror(number))
            fsync(handle)

        monkeypatch.setattr(files.os, "fsync", fail)

    yield start
    monkeypatch.undo()


def test_a_full_disk_does_not_stop_the_run(script, small, folder, failing):
    failing(".state", errno.ENOSPC)
    ran = script("train.py", "--model_job", "student", *small, "--checkpoint_dir", folder, "--epochs", 3)
    assert ran.code == 0 and (folder / "resnet18.pth").exists()
    assert "going on, but the run's state is not saved" in ran.err and "No space left on device" in ran.err
    assert not list(folder.glob(".*"))


def test_a_full_disk_leaves_the_state_as_it_was(state_file, failing):
    before = state_file.read_bytes(), runstate.previous(state_file).read_bytes()
    failing("a.state", errno.ENOSPC)
    with pytest.raises(UserError, match=r"No space left on device \(\S+ MB are free\); what was there is as it was"):
        runstate.save({"position": {"epoch": 3}}, state_file)
    assert (state_file.read_bytes(), runstate.previous(state_file).read_bytes()) == before
    assert len(list(state_file.parent.iterdir())) == 2


def test_a_folder_that_turns_read_only_costs_no_training(script, small, folder, failing, monkeypatch):
    """The checkpoint can't be written at the end; when it can be again, nothing is trained once more."""
    args = ["--model_job", "student", *small, "--checkpoint_dir", folder, "--epochs", 3]
    failing(".pth", errno.EROFS)
    ran = script("train.py", *args)
    assert ran.code == 2 and "resnet18.pth: Read-only file system" in ran.err and ran.out.count("Epoch") == 3
    failing("nothing", 0)
    ran = script("train.py", *args, "--resume")
    assert ran.code == 0 and "Epoch" not in ran.out and "Test Loss" in ran.out


def test_what_a_killed_process_left_goes(script, small, folder):
    for name in (".resnet18.state.abc.tmp", ".resnet18.pth.abc.tmp"):
        (folder / name).write_bytes(b"half")
    other = folder / ".Distilled_resnet18.pth.abc.tmp"  # which another run may be writing
    other.write_bytes(b"half")
    assert script("train.py", "--model_job", "student", *small, "--checkpoint_dir", folder, "--epochs", 1).code == 0
    assert list(folder.glob(".*")) == [other]


def test_a_lock_goes_with_its_process_even_if_a_child_lives_on(tmp_path):
    """A worker process that outlives a killed run inherits its files, but must not hold its lock."""
    child = FORKS.Process(target=die_with_a_lock, args=(tmp_path / "lock",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "lock").exists()
    with files.locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


def die_with_a_lock(path):
    with files.locked(path):
        if os.fork() == 0:
            time.sleep(30)
        os.kill(os.getpid(), signal.SIGKILL)


# the end of a run, and other settings


@pytest.fixture
def trained(tmp_path):
    """A keeper of a run whose training is done, its state on the disk."""
    path = tmp_path / "folder" / "a.state"
    path.parent.mkdir()
    keeper = runstate.Keeper(path, {"recipe": {"epochs": 2}})
    keeper.begin(None)
    keeper.figures.append({"epoch": 1})
    keeper.save({"position": {"epoch": 2}})
    return keeper


def test_a_keeper_is_not_idle_while_it_writes(trained, monkeypatch):
    trained._failed()
    may_end = threading.Event()
    monkeypatch.setattr(runstate, "save", lambda *state: may_end.wait(60))
    assert trained.idle()
    trained.save({"position": {"epoch": 2}})
    assert not trained.idle()
    may_end.set()
    trained._failed()
    assert trained.idle()


@pytest.mark.parametrize("idle, saves", [(True, 8), (False, 1)])
def test_an_epoch_does_not_wait_for_the_state_of_the_one_before(script, small, folder, monkeypatch, idle, saves):
    """But the last one, whose state the checkpoint is made from if it can't be written at once."""
    saved, save = [], runstate.Keeper.save
    monkeypatch.setattr(runstate.Keeper, "save", lambda self, state: saved.append(1) or save(self, state))
    monkeypatch.setattr(runstate.Keeper, "idle", lambda self: idle)
    assert script("train.py", "--model_job", "student", *small, "--checkpoint_dir", folder, *RUN).code == 0
    assert len(saved) == saves


def test_the_state_goes_when_all_files_are_written(trained):
    with trained.finishing():
        trained._failed()
        assert trained.path.exists()
    assert list(trained.path.parent.iterdir()) == []


def test_the_state_stays_when_a_file_can_not_be_written(trained):
    with pytest.raises(UserError, match="cannot write.*; the training is kept: .* --resume"), trained.finishing():
        raise UserError("cannot write it")
    assert runstate.load(trained.path)["position"] == {"epoch": 2}


@pytest.mark.parametrize("stop", [0, signal.SIGTERM])
def test_a_state_that_could_not_be_saved_is_saved_elsewhere(tmp_path, monkeypatch, trained, failing, stop):
    """The disk is full for the state and for the checkpoint, at the end, or when a signal comes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failing("folder", errno.ENOSPC)
    trained.stop = stop
    with pytest.raises(UserError, match=rf"its state is in {tmp_path}/run-\S+/a.state: .* --resume") as raised:
        trained.save({"position": {"epoch": 3}})
        with trained.finishing():
            raise UserError("cannot write it")
    elsewhere = re.search(r"its state is in (\S+):", str(raised.value))[1]
    assert runstate.load(Path(elsewhere))["position"] == {"epoch": 3}


def test_a_state_that_can_not_be_removed_does_not_unfinish_a_run(trained, monkeypatch, capsys):
    def read_only(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(type(trained.path), "unlink", read_only)
    with trained.finishing():
        pass
    assert "the state of this finished run, can't be removed: Read-only file system" in capsys.readouterr().err


def test_what_may_differ_is_not_refused():
    there, now = {"recipe": {"epochs": 2}, "start": {"epochs": 1}}, {"recipe": {"epochs": 5}, "start": None}
    with pytest.raises(UserError, match=r"a comes from other settings \(recipe.epochs: 2 there, 5 now\); cure"):
        runstate.refuse_difference(there, now, Path("a"), "cure", ("start",))
    runstate.refuse_difference(there, now, Path("a"), "cure", ("recipe.epochs", "start"))


def test_differences_name_nested_keys():
    there = {"a": {"b": 1, "c": 2}, "more": 3, "was": {"d": 6}, "is": None}
    now = {"a": {"b": 1, "c": 4}, "new": 5, "was": None, "is": {"d": 6}}
    found = {"a.c": (2, 4), "new": (None, 5), "was": ({"d": 6}, None), "is.d": (None, 6)}
    assert runstate.differences(there, now) == found


def test_a_signal_is_heard_where_there_is_no_terminal(trained, monkeypatch):
    def hung_up(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", hung_up)
    with pytest.raises(Stopped) as stopped, trained.listening():
        for _ in range(2):  # it often comes twice, and is no second wish
            os.kill(os.getpid(), signal.SIGHUP)
            trained.heard_at -= 2 * runstate.ONE_WISH
        assert trained.due() and trained.stop == signal.SIGHUP
        trained.save({"position": {"epoch": 3}})
    assert stopped.value.number == signal.SIGHUP and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert runstate.load(trained.path)["position"] == {"epoch": 3}


def test_a_signal_is_heeded_between_two_steps(trained):
    with pytest.raises(Stopped) as stopped, trained.listening():
        trained.heed()
        os.kill(os.getpid(), signal.SIGTERM)
        trained.heed()
    assert (stopped.value.number, stopped.value.path) == (signal.SIGTERM, trained.path)


def test_a_second_wish_stops_at_once(trained):
    with pytest.raises(KeyboardInterrupt), trained.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same wish, by another way
        trained.heard_at -= 2 * runstate.ONE_WISH
        os.kill(os.getpid(), signal.SIGINT)


def test_a_save_that_is_due_is_no_wish_to_stop(trained):
    trained.saved -= 2 * runstate.EVERY
    assert trained.due() and trained.stop == 0
