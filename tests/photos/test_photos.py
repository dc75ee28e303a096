"""`predict --data Photos`: every file gets its row, those without a digit with the reason."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import rows

from mnist_lightning.commands.cli import run
from mnist_lightning.photos import Photos
from mnist_lightning.sources import load_digits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    adam = ["--model.optimizer", "Adam", "--model.optimizer.lr", "2e-3", "--trainer.max_epochs", "4"]
    data = ["--data.source", "digits", "--pictures", "false"]
    assert run(["fit", *adam, *data, "--trainer.default_root_dir", str(root)]) == 0
    return next(root.rglob("best.ckpt"))


def draw(path: Path, index: int = 0) -> int:
    """Writes a test digit, dark on light, 140×140; returns its label."""
    test = load_digits().test
    Image.fromarray(255 - test.images[index, 0].numpy()).resize((140, 140)).save(path)
    return int(test.labels[index])


def found(folder: Path) -> dict[str, str]:
    """The remark on each file, by name."""
    photos = Photos(str(folder))
    photos.setup("predict")
    return {photo.name: photo.remark for photo in photos.photos}


def predict(checkpoint: Path, path: Path, *args: str) -> int:
    return run(["predict", "--ckpt_path", str(checkpoint), "--data", "Photos", "--data.path", str(path), *args])


def test_folder_gives_a_table_a_csv_and_a_contact_sheet(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my digits"
    (folder / "more").mkdir(parents=True)
    names = [f"{i:02}.png" for i in range(20)] + ["more/last.jpg"]
    labels = [draw(folder / name, i) for i, name in enumerate(names)]
    sheet = folder / "seen.png"
    for _ in range(2):  # the second time it replaces its own sheet, and doesn't classify it
        assert predict(checkpoint, folder, "--data.save_seen", str(sheet)) == 0
        printed = capsys.readouterr().out.splitlines()
        table = [line.split() for line in printed[1 : len(labels) + 1]]
        assert printed[0].split() == ["file", "classified", "as", "confidence", "second", "guess"]
        written = rows(checkpoint.parent.parent / "photos.csv")
        assert [row["file"] for row in written] == [line[0] for line in table] == names
        assert [row["predicted"] for row in written] == [line[1] for line in table]
    for row in written:
        p = [float(row[f"p{digit}"]) for digit in range(10)]
        assert [p[int(row["predicted"])], p[int(row["second"])]] == sorted(p)[:-3:-1]
    assert sum(int(row["predicted"]) == label for row, label in zip(written, labels, strict=True)) >= 18
    with Image.open(sheet) as picture:
        colours = picture.getcolors(picture.width * picture.height)
        assert picture.width > 8 * 28 and colours is not None and len(colours) > 10
    assert predict(checkpoint, folder / "03.png") == 0  # a single file, too


def test_every_file_without_one_digit_gets_its_reason(tmp_path: Path) -> None:
    for i in range(2):
        draw(tmp_path / f"{i}.png", i)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (200, 200), 255).save(tmp_path / "c.png")
    Image.new("1", (12_500, 12_500)).save(tmp_path / "d.png")
    two = Image.new("L", (280, 140), 255)
    for i in range(2):
        two.paste(Image.open(tmp_path / f"{i}.png"), (140 * i, 0))
    two.save(tmp_path / "e.png")
    (tmp_path / "f.png").symlink_to("nowhere.png")
    remarks = found(tmp_path)
    assert "no picture that Pillow reads" in remarks["a.jpg"]
    assert "can't be read" in remarks["b.png"]
    assert "no digit" in remarks["c.png"]
    assert "too large" in remarks["d.png"]
    assert "seems to hold 2 digits" in remarks["e.png"]
    assert "no file" in remarks["f.png"]
    assert remarks["0.png"] == remarks["1.png"] == ""


def test_folder_without_any_picture_gets_its_rows_and_exit_code_1(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert predict(checkpoint, tmp_path) == 1
    assert "no picture that Pillow reads" in capsys.readouterr().out


def test_linked_folders_are_followed_once_and_in_no_circle(tmp_path: Path) -> None:
    (tmp_path / "photos" / ".hidden").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos/a.png", "photos/.hidden/b.png", "elsewhere/c.png"):
        draw(tmp_path / name)
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    assert found(tmp_path / "photos") == {"a.png": "", "link/c.png": ""}


def test_folder_that_cannot_be_read_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    draw(tmp_path / "a.png")
    scandir = os.scandir

    def guarded(path: str) -> object:  # a stand-in for permissions: root may read everything
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert found(tmp_path) == {"a.png": "", "locked": "a folder that can't be read"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all file names are Unicode")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_file_name_is_written_and_shown_on_any_console(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table = tmp_path / "photos", tmp_path / "photos.csv"
    folder.mkdir()
    draw(folder / "a.png")
    (folder / "a.png").rename(folder / os.fsdecode(b"\xe9-\xe7\x8c\xab\n.png"))  # a Latin-1 byte, a cat in UTF-8
    photos = Photos(str(folder), str(tmp_path / "seen.png"))
    photos.setup("predict")
    console = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")  # as main() sets it
    monkeypatch.setattr(sys, "stdout", console)
    assert photos.tell(torch.tensor([[0.1, 0.9]]), table, ["猫", "no"])
    console.seek(0)
    header, row = console.read().splitlines()
    assert row.split() == ["\\xe9-??.png", "no", "90.0", "%", "?", "(10.0", "%)"]
    assert rows(table)[0]["file"] == "\\xe9-猫\n.png"
    assert (tmp_path / "seen.png").is_file()


def test_classes_go_by_their_names_and_doubts_are_remarked_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    photos = Photos(str(tmp_path))
    photos.setup("predict")
    # Of one picture only: --trainer.limit_predict_batches left the other out.
    assert not photos.tell(torch.tensor([[0.35, 0.25, 0.4]]), tmp_path / "photos.csv", ["cat", "dog", "owl"])
    first, second = rows(tmp_path / "photos.csv")
    told = {"predicted": "owl", "second": "cat", "remark": "unsure", "pcat": "0.350000", "pdog": "0.250000"}
    assert first == {"file": "a.png", **told, "powl": "0.400000"}
    assert second["predicted"] == "" and second["remark"] == "left out by --trainer.limit_predict_batches"
    assert capsys.readouterr().out.splitlines()[1].split() == "a.png owl 40.0 % cat (35.0 %) unsure".split()
