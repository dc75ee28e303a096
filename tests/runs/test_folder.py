"""Run folders: one for each run, even for runs that start together; the newest is found again."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mnist_lightning.errors import UserError
from mnist_lightning.runs.folder import LOGS, claim, find_checkpoint, run_of, shown_path, training_in, unclaim


def checkpoint(root: Path, run: str, *, age: int, names: tuple[str, ...] = ("best", "last")) -> Path:
    """A run that ended `age` seconds ago; returns its folder of checkpoints."""
    folder = root / LOGS / run / "checkpoints"
    folder.mkdir(parents=True)
    for name in names:
        path = folder / f"{name}.ckpt"
        path.write_bytes(b"")
        os.utime(path, (10**9 - age, 10**9 - age))
    return folder


# ---- claim


def test_next_run_follows_the_highest_and_fills_no_gap(tmp_path: Path) -> None:
    for name in ("version_0", "version_3", "version_10", "version_x", "notes"):
        (tmp_path / LOGS / "ConvNet" / name).mkdir(parents=True)
    assert claim(tmp_path, "ConvNet").name == "version_11"


def test_each_model_counts_for_itself(tmp_path: Path) -> None:
    assert [claim(tmp_path, name).name for name in ("ConvNet", "ResNet18", "ConvNet-digits")] == ["version_0"] * 3


def test_number_that_another_process_takes_in_between_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        found = list(looked(folder, pattern))
        (folder / "version_0").mkdir(parents=True)  # after this process has looked
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert claim(tmp_path, "ConvNet").name == "version_1"


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("purged"),
    lambda path: path.write_text(""),
    lambda path: (path.mkdir(), (path / "ConvNet").symlink_to("purged")),
])  # fmt: skip
def test_what_cannot_hold_runs_is_refused(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / LOGS)
    got = f"a file, or a link to a folder that is gone: .*{LOGS}"
    with pytest.raises(UserError, match=f"a folder for runs\ngot {got}.*\n.*--trainer.default_root_dir"):
        claim(tmp_path, "ConvNet")


def test_read_only_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / LOGS))
    monkeypatch.setattr(os, "mkdir", Mock(side_effect=denied))  # root may write everywhere
    with pytest.raises(UserError, match="got Permission denied: .*lightning_logs"):
        claim(tmp_path, "ConvNet")


def test_number_of_a_dangling_link_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / LOGS / "ConvNet"
    folder.mkdir(parents=True)
    (folder / "version_3").symlink_to("purged")
    assert claim(tmp_path, "ConvNet").name == "version_4"


def test_run_is_trained_by_one_process_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    script = """if True:
        import pathlib, sys
        from mnist_lightning.runs.folder import training_in
        with training_in(pathlib.Path(sys.argv[1])):
            print("locked", flush=True)
            sys.stdin.read()"""
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], cwd=Path(__file__).parents[2], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "locked\n"
        refused = "a run that no other process is training\ngot .*\n.*start a new run"
        with pytest.raises(UserError, match=refused), training_in(tmp_path):
            pass
        other.kill()
    for _ in range(2):  # given back, it can be taken again; the file that is left means nothing
        with training_in(tmp_path):
            assert (tmp_path / ".training.lock").is_file()


def test_unclaim_removes_a_run_without_checkpoints_and_the_folders_that_it_leaves_empty(tmp_path: Path) -> None:
    kept, empty = checkpoint(tmp_path, "ConvNet/version_0", age=1), claim(tmp_path, "ConvNet")
    other = claim(tmp_path / "other", "ConvNet")
    for run in (kept.parent, empty, other):
        (run / "config.yaml").write_text("a: 1")
        unclaim(run)
    assert (kept.parent / "config.yaml").is_file()
    assert not empty.exists() and os.listdir(tmp_path / "other") == []


# ---- find_checkpoint


def test_newest_is_the_run_that_saved_last_whatever_its_model_and_number(tmp_path: Path) -> None:
    checkpoint(tmp_path, "ConvNet/version_7", age=50)
    resumed = checkpoint(tmp_path, "ResNet18-digits/version_2", age=10)
    checkpoint(tmp_path, "ConvNet/version_3", age=90)
    assert find_checkpoint("best", tmp_path) == resumed / "best.ckpt"
    assert find_checkpoint("last", tmp_path) == resumed / "last.ckpt"
    assert find_checkpoint("a/last.ckpt", tmp_path) == Path("a/last.ckpt")


def test_link_to_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs/A/version_0/checkpoints").mkdir(parents=True)
    last = tmp_path / "lightning_logs/A/version_0/checkpoints/last.ckpt"
    last.touch()
    last.with_name("best.ckpt").symlink_to("gone")
    assert find_checkpoint("last", tmp_path) == last


def test_newest_of_a_model_leaves_out_the_others(tmp_path: Path) -> None:
    convnet = checkpoint(tmp_path, "ConvNet/version_0", age=50)
    resnet = checkpoint(tmp_path, "ResNet18-digits/version_0", age=10)
    checkpoint(tmp_path, "ResNet18/version_4", age=20)
    checkpoint(tmp_path, "ResNet180/version_4", age=1)
    assert find_checkpoint("last", tmp_path, "ConvNet") == convnet / "last.ckpt"
    assert find_checkpoint("last", tmp_path, "ResNet18") == resnet / "last.ckpt"


@pytest.mark.parametrize(("which", "names"), [("best", ()), ("last", ("best",)), ("best", ("last",))])
def test_run_without_that_checkpoint_is_an_error_not_another_run(
    which: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint(tmp_path, "ConvNet/version_0", age=1, names=names)
    with pytest.raises(UserError, match=f"a run of a model with a checkpoint under {tmp_path / LOGS}\ngot none"):
        find_checkpoint(which, tmp_path)


# ---- where results go


def test_folder_of_somebody_elses_that_is_called_checkpoints_is_no_run(tmp_path: Path) -> None:
    assert run_of(checkpoint(tmp_path, "ConvNet/version_3", age=1) / "best.ckpt") is None


def test_path_is_shown_as_a_person_would_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs" / "a") == os.path.join("runs", "a")
    assert shown_path(Path("/a")) == "/a"
