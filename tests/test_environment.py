"""What a result says of the code that made it."""

import subprocess
from pathlib import Path

import pytest

from util import environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with one committed file, which the code is taken to lie in."""
    commands = ["init -q", "add code.py", "-c user.name=a -c user.email=a@b commit -q -m first"]
    (tmp_path / "code.py").write_text("1")
    for command in commands:
        try:
            subprocess.run(["git", *command.split()], cwd=tmp_path, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("git is not installed")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    environment.commit.cache_clear()
    yield tmp_path
    environment.commit.cache_clear()


def test_the_commit_and_whether_the_code_was_changed(checkout):
    sha, changed = environment.commit()
    assert len(sha) == 40 and changed is False
    (checkout / "code.py").write_text("2")
    environment.commit.cache_clear()
    assert environment.commit() == (sha, True)


def no_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")


def a_copy_within_another_repository(checkout, monkeypatch):
    (checkout / "copy").mkdir()
    monkeypatch.setattr(environment, "ROOT", checkout / "copy")


def a_damaged_repository(checkout, monkeypatch):
    (checkout / ".git" / "HEAD").write_text("nothing")


@pytest.mark.parametrize("change", [no_git, a_copy_within_another_repository, a_damaged_repository])
def test_without_a_checkout_no_commit_is_told(checkout, monkeypatch, change):
    change(checkout, monkeypatch)
    assert environment.commit() == (None, None)


def test_the_driver_is_known_by_what_it_says_of_itself(monkeypatch):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert environment._driver() == "535.104.05"
