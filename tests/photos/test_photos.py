"""`predict --data Photos`: each file gets its row, the unreadable ones with the reason."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_lightning.commands.cli import run
from mnist_lightning.sources import load_digits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    adam = ["--model.optimizer", "Adam", "--model.optimizer.lr", "2e-3", "--trainer.max_epochs", "4"]
    assert run(["fit", *adam, "--data.source", "digits", "--trainer.default_root_dir", str(root)]) == 0
    return next(root.rglob("best.ckpt"))


def draw(path: Path, index: int) -> int:
    """Writes a test digit, dark on light, 140×140; returns its label."""
    test = load_digits().test
    Image.fromarray(255 - test.images[index, 0].numpy()).resize((140, 140)).save(path)
    return int(test.labels[index])


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[int]]:
    folder = tmp_path / "my digits"
    (folder / "more").mkdir(parents=True)
    labels = [draw(folder / f"{i:02}.png", i) for i in range(20)]
    return folder, [*labels, draw(folder / "more" / "last.jpg", 20)]


def predict(checkpoint: Path, path: Path, *args: str) -> int:
    return run(["predict", "--ckpt_path", str(checkpoint), "--data", "Photos", "--data.path", str(path), *args])


def test_folder_is_read_into_a_table_a_csv_and_a_contact_sheet(
    folder: tuple[Path, list[int]], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, labels = folder
    sheet = tmp_path / "seen.png"
    assert predict(checkpoint, path, "--data.save_seen", str(sheet)) == 0
    printed = capsys.readouterr().out.splitlines()
    table = printed[1 : len(labels) + 1]
    assert printed[0].split() == ["file", "digit", "confidence", "second", "guess"]
    with (checkpoint.parent.parent / "photos.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"{i:02}.png" for i in range(20)] + ["more/last.jpg"]
    assert [row["file"] for row in rows] == [line.split()[0] for line in table] == names
    assert [row["predicted"] for row in rows] == [line.split()[1] for line in table]
    for row in rows:
        p = [float(row[f"p{digit}"]) for digit in range(10)]
        assert [p[int(row["predicted"])], p[int(row["second"])]] == sorted(p)[:-3:-1]
    assert sum(int(row["predicted"]) == label for row, label in zip(rows, labels, strict=True)) >= 18
    with Image.open(sheet) as picture:
        assert picture.width > 28 and np.asarray(picture).std() > 0
    assert predict(checkpoint, path / "03.png") == 0  # a single file, too


def test_unreadable_files_get_their_reason_and_the_others_go_on(
    folder: tuple[Path, list[int]], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = folder
    shutil.rmtree(path / "more")
    (path / "a.jpg").write_bytes(b"no picture")
    whole = (path / "00.png").read_bytes()
    (path / "b.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (200, 200), 255).save(path / "c.png")
    Image.new("1", (10_000, 10_000)).save(path / "d.png")
    two = Image.new("L", (280, 140), 255)
    for at, name in ((0, "00.png"), (140, "01.png")):
        two.paste(Image.open(path / name), (at, 0))
    two.save(path / "e.png")
    assert predict(checkpoint, path) == 1
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "no picture that Pillow reads" in said["a.jpg"]
    assert "damaged" in said["b.png"]
    assert "empty paper" in said["c.png"]
    assert "too large" in said["d.png"]
    assert "seems to hold 2 digits" in said["e.png"]
    assert "%" in said["19.png"]


def test_a_folder_of_nothing_readable_is_told_as_well(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert predict(checkpoint, tmp_path) == 1
    assert "no picture that Pillow reads" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "message"), [
    ("nowhere", "expected a picture or a folder of them at --data.path\n       got nothing: nowhere"),
    (".", "expected pictures at --data.path\n       got an empty folder: ."),
])  # fmt: skip
def test_wrong_path_is_explained(
    path: str, message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert predict(checkpoint, Path(path)) == 2
    assert message in capsys.readouterr().err


def test_somebodys_picture_is_not_overwritten_by_the_contact_sheet(
    folder: tuple[Path, list[int]], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = folder
    before = (path / "00.png").read_bytes()
    assert predict(checkpoint, path, "--data.save_seen", str(path / "00.png")) == 2
    assert "got " in capsys.readouterr().err
    assert (path / "00.png").read_bytes() == before


@pytest.mark.parametrize("command", ["fit", "test", "validate"])
def test_photos_are_for_predict(
    command: str, folder: tuple[Path, list[int]], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [] if command == "fit" else ["--ckpt_path", str(checkpoint)]
    root = ["--trainer.default_root_dir", str(tmp_path / "root")]
    assert run([command, *args, "--data", "Photos", "--data.path", str(folder[0]), *root]) == 2
    assert "Photos, which have none" in capsys.readouterr().err
    assert not (tmp_path / "root" / "lightning_logs").exists()
