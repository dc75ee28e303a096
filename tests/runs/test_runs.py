"""Run folders: one for each run, even for runs that start together; the newest is found again."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mnist_lightning.errors import UserError
from mnist_lightning.runs.folder import LOGS, RunLogger, claim, newest_checkpoint, run_of, shown_path


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


def test_first_run_is_version_0_and_exists(tmp_path: Path) -> None:
    run = claim(tmp_path / "new", "ConvNet")
    assert run == tmp_path / "new" / "lightning_logs" / "ConvNet" / "version_0"
    assert run.is_dir()


def test_next_run_follows_the_highest_and_fills_no_gap(tmp_path: Path) -> None:
    for name in ("version_0", "version_3", "version_10", "version_x", "notes"):
        (tmp_path / LOGS / "ConvNet" / name).mkdir(parents=True)
    assert claim(tmp_path, "ConvNet").name == "version_11"


def test_each_model_counts_for_itself(tmp_path: Path) -> None:
    assert [claim(tmp_path, name).name for name in ("ConvNet", "ResNet18", "ConvNet-digits")] == ["version_0"] * 3


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    together = threading.Barrier(16)

    def start(_: int) -> Path:
        together.wait()
        return claim(tmp_path, "ConvNet")

    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(start, range(16)))
    assert sorted(run.name for run in runs) == sorted(f"version_{number}" for number in range(16))


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


# ---- newest_checkpoint


def test_newest_is_the_run_that_saved_last_not_the_highest_number(tmp_path: Path) -> None:
    checkpoint(tmp_path, "ConvNet/version_7", age=50)
    resumed = checkpoint(tmp_path, "ConvNet/version_2", age=10)
    checkpoint(tmp_path, "ConvNet/version_3", age=90)
    assert newest_checkpoint(tmp_path, "best", None) == resumed / "best.ckpt"
    assert newest_checkpoint(tmp_path, "last", None) == resumed / "last.ckpt"


def test_newest_of_a_model_leaves_out_the_others(tmp_path: Path) -> None:
    convnet = checkpoint(tmp_path, "ConvNet/version_0", age=50)
    resnet = checkpoint(tmp_path, "ResNet18-digits/version_0", age=10)
    checkpoint(tmp_path, "ResNet18/version_4", age=20)
    checkpoint(tmp_path, "ResNet180/version_4", age=1)
    assert newest_checkpoint(tmp_path, "last", "ConvNet") == convnet / "last.ckpt"
    assert newest_checkpoint(tmp_path, "last", "ResNet18") == resnet / "last.ckpt"


@pytest.mark.parametrize(("which", "names"), [("best", ()), ("last", ("best",)), ("best", ("last",))])
def test_run_without_that_checkpoint_is_an_error_not_another_run(
    which: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint(tmp_path, "ConvNet/version_0", age=1, names=names)
    with pytest.raises(UserError, match=f"a run of a model with a checkpoint under {tmp_path / LOGS}\ngot none"):
        newest_checkpoint(tmp_path, which, None)


def test_message_names_the_model_that_has_no_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, "ConvNet/version_0", age=1)
    with pytest.raises(UserError, match="expected a run of ResNet18 with a checkpoint"):
        newest_checkpoint(tmp_path, "best", "ResNet18")


# ---- where results go


def test_checkpoint_belongs_to_the_run_around_its_folder() -> None:
    assert run_of(Path("a/version_3/checkpoints/best.ckpt")) == Path("a/version_3")


def test_checkpoint_from_elsewhere_writes_beside_itself() -> None:
    assert run_of(Path("downloads/best.ckpt")) == Path("downloads")


def test_logger_writes_into_the_run_itself(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "ConvNet" / "version_3")
    logger.log_hyperparams({"batch_size": 64, "scheduler": None, "_class_path": "x", "optimizer": {"lr": 0.01}})
    logger.log_metrics({"val/acc": 0.5}, step=1)
    logger.save()
    logger.finalize("success")
    events, metrics = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert metrics.name == "metrics.csv"
    assert events.parent == tmp_path / "ConvNet" / "version_3"
    assert events.name.startswith("events.out.tfevents")


def test_path_is_shown_as_a_person_would_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs" / "a") == os.path.join("runs", "a")
    assert shown_path(Path("/a")) == "/a"
