"""ImageFolder: which pictures go where, how they are read, what is said of those that can't be."""

import itertools
import os
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from running import rows
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize

from mnist_lightning import ImageFolder
from mnist_lightning.errors import UserError
from mnist_lightning.photos import image_folder
from mnist_lightning.photos.image_folder import crops_and_mirrors
from mnist_lightning.photos.reading import read_squares

PARTS = ("train", "val", "test")
COLOURS = {"ants": (200, 0, 0), "bees": (0, 200, 0), "黄蜂": (0, 0, 200)}


def paint(folder: Path, names: Iterable[str], colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    """Pictures of one colour, the i-th a bit lighter than the one before: they can be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        shade = tuple(part + i for part in colour)
        Image.new("RGB", (40, 30), shade).save(folder / name)


def numbers(count: int, start: int = 0) -> list[str]:
    return [f"{i:03}.png" for i in range(start, start + count)]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """20, 20 and 10 pictures of three classes."""
    for (name, colour), count in zip(COLOURS.items(), (20, 20, 10), strict=True):
        paint(tmp_path / "flat" / name, numbers(count), colour)
    return tmp_path / "flat"


def ready(path: Path, stage: str = "fit", **settings: object) -> ImageFolder:
    data = ImageFolder(str(path), size=28, **settings)
    data.setup(stage)
    return data


def names(data: ImageFolder, part: str) -> list[str]:
    return [str(picture.file.relative_to(data.path)) for picture in data.pictures[part]]


def batches(loader: DataLoader) -> list[tuple[Tensor, Tensor]]:
    return [(images, labels) for images, labels in loader]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


# ---- Layouts


def test_each_class_is_split_by_the_same_shares(flat: Path) -> None:
    (flat / "ants" / "000.png").rename(flat / "ants" / "000.PNG")
    data = ready(flat, val_size=0.1, test_size=0.3)
    assert data.class_names == sorted(COLOURS)
    counts = {part: [sum(name.startswith(cls) for name in names(data, part)) for cls in COLOURS] for part in PARTS}
    assert counts == {"train": [12, 12, 6], "val": [2, 2, 1], "test": [6, 6, 3]}
    assert len(set().union(*(names(data, part) for part in counts))) == 50
    assert len({name.split("/")[0] for name in names(data, "test")[:5]}) > 1  # the classes are mixed


def test_another_folder_can_be_tested_whole(flat: Path) -> None:
    data = ready(flat, "test", test_size=1)
    assert len(names(data, "test")) == 50
    with pytest.raises(UserError, match="expected pictures to train on\ngot none: --data.test_size 1 is for test"):
        ready(flat, test_size=1)


def test_split_is_the_same_on_every_machine_whatever_can_be_read(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ready(flat)
    assert names(before, "val")[:3] == ["bees/014.png", "黄蜂/007.png", "ants/014.png"]
    (flat / "ants" / "000.png").write_bytes(b"broken")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **kw: ((at, fs, ns[::-1]) for at, fs, ns in walk(*args, **kw)))
    after = ready(flat)
    for part in before.pictures:
        assert names(after, part) == [name for name in names(before, part) if name != "ants/000.png"]
    assert names(ready(flat, split_seed=1), "val") != names(before, "val")


@pytest.mark.parametrize(("folders", "expected"), [
    (["train", "val", "test"], {"train": ("train", 20), "val": ("val", 6), "test": ("test", 6)}),
    (["train", "valid", "test"], {"train": ("train", 20), "val": ("valid", 6), "test": ("test", 6)}),
    (["train", "val"], {"train": ("train", 16), "val": ("train", 4), "test": ("val", 6)}),
    (["train", "test"], {"train": ("train", 16), "val": ("train", 4), "test": ("test", 6)}),
    (["Training", "Testing"], {"train": ("Training", 16), "val": ("Training", 4), "test": ("Testing", 6)}),
])  # fmt: skip
def test_folders_of_parts_are_kept(
    folders: list[str], expected: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    for folder, name in itertools.product(folders, ("b", "a")):
        paint(tmp_path / folder / name / "deeper", numbers(10 if "rain" in folder else 3))
    data = ready(tmp_path, val_size=0.2)
    assert data.class_names == ["a", "b"]
    for part, (source, count) in expected.items():
        assert {name.split("/")[0] for name in names(data, part)} == {source}
        assert len(names(data, part)) == count


def test_labels_are_positions_in_class_names_and_belong_to_their_pictures(flat: Path) -> None:
    data = ready(flat)
    for part in PARTS:
        for images, labels in getattr(data, f"{part}_dataloader")():
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 28, 28)
            assert images[:, :, 14, 14].argmax(1).tolist() == labels.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_class_may_be_called_by_bytes_that_are_no_text(flat: Path) -> None:
    (flat / "ants").rename(flat / os.fsdecode(b"fourmis \xe9"))
    data = ready(flat)
    assert data.class_names == ["bees", "fourmis \\xe9", "黄蜂"]
    assert torch.bincount(data.train_set.labels).tolist() == [14, 14, 6]


def test_runs_beside_the_classes_are_no_class(flat: Path) -> None:
    paint(flat / "lightning_logs" / "ResNet18", ["report.png"])
    assert ready(flat).class_names == sorted(COLOURS)


def test_accents_may_be_stored_composed_or_apart(tmp_path: Path) -> None:
    for folder in ("train/caf\u00e9", "train/b", "test/cafe\u0301", "test/b"):
        paint(tmp_path / folder, numbers(8))
    assert ready(tmp_path).class_names == ["b", "caf\u00e9"]


def test_only_what_a_command_needs_is_read_and_share_without_use_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        paint(tmp_path / folder, numbers(8))
    assert list(ready(tmp_path, "test", test_size=1).parts()) == ["test"]
    assert f"Not used: --data.test_size 1: {tmp_path} has a folder for that" in capsys.readouterr().err


def test_train_size_takes_as_many_of_each_class(flat: Path) -> None:
    data = ready(flat, train_size=9)
    assert torch.bincount(data.train_set.labels).tolist() == [3, 3, 3]


@pytest.mark.parametrize("change", ["added", "removed"])
def test_fit_does_not_go_on_with_other_pictures(change: str, flat: Path, tmp_path: Path) -> None:
    state = ready(flat).state_dict()
    moved = shutil.copytree(flat, tmp_path / "moved")
    ready(moved).load_state_dict(state)
    if change == "added":
        shutil.copy(moved / "ants" / "000.png", moved / "ants" / "more.png")
    else:
        (moved / names(ready(moved), "train")[0]).unlink()
    with pytest.raises(UserError, match="expected the pictures of the run that goes on\ngot others in "):
        ready(moved).load_state_dict(state)


def test_checkpoints_classes_keep_their_labels_where_others_are_missing(flat: Path, tmp_path: Path) -> None:
    state = ready(flat).state_dict()
    shutil.rmtree(flat / "ants")
    data = ready(flat, "test")
    data.load_state_dict(state)
    assert data.class_names == sorted(COLOURS) and set(data.test_set.labels.tolist()) == {1, 2}
    (flat / "bees").rename(flat / "wasps")
    with pytest.raises(UserError, match="expected the classes of the checkpoint: ants, bees, 黄蜂\ngot others: wasps"):
        ready(flat, "test").load_state_dict(state)


# ---- Reading


def read(file: Path, size: int) -> Tensor:
    (square,), _ = read_squares([file], size)
    return square


def test_square_is_the_tutorials(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (768, 512, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    expected = Compose([Resize(256), CenterCrop(224), PILToTensor()])(picture)
    assert (read(tmp_path / "a.png", 224).int() - expected.int()).abs().max() <= 1


def halves(left: object, right: object, mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, (200, 100), left)
    picture.paste(right, (100, 0, 200, 100))
    return picture


WIDE = Image.fromarray(np.tile(np.repeat(np.array([[0, 32896]], np.uint16), 100, axis=1), (100, 1)))
PALETTE = halves((250, 0, 0), (0, 0, 250)).convert("P", palette=Image.Palette.ADAPTIVE)
CASES = {
    "grey.jpg": (halves(0, 255, "L"), (0, 0, 0), (255, 255, 255)),
    "bits.bmp": (halves(0, 1, "1"), (0, 0, 0), (255, 255, 255)),
    "16.png": (WIDE, (0, 0, 0), (128, 128, 128)),
    "16.TIFF": (WIDE, (0, 0, 0), (128, 128, 128)),
    "floats.tif": (halves(-1.5, 7.0, "F"), (0, 0, 0), (255, 255, 255)),
    "palette.gif": (PALETTE, (250, 0, 0), (0, 0, 250)),
    "cmyk.jpg": (halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), (255, 0, 0), (0, 0, 255)),
    "alpha.webp": (halves((250, 0, 0, 255), (0, 0, 250, 0), "RGBA"), (250, 0, 0), (255, 255, 255)),
    "grey alpha.png": (halves((0, 255), (0, 0), "LA"), (0, 0, 0), (255, 255, 255)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_picture_becomes_colour_on_white(name: str, tmp_path: Path) -> None:
    picture, left, right = CASES[name]
    picture.save(tmp_path / name)
    square = read(tmp_path / name, 56).int()
    assert square.shape == (3, 56, 56)
    for column, colour in ((10, left), (45, right)):
        assert (square[:, 28, column] - torch.tensor(colour)).abs().max() <= 3


def test_first_frame_is_taken_and_the_cameras_rotation_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left of the pixels is the top of the picture
    halves((250, 0, 0), (0, 0, 250)).save(tmp_path / "a.jpg", exif=exif)
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    turned, first = read(tmp_path / "a.jpg", 28), read(tmp_path / "b.gif", 28)
    assert turned[0, 4].float().mean() > 240 and turned[2, 23].float().mean() > 240
    assert first[:, 14, 14].tolist() == [0, 255, 0]


def test_large_photos_are_read_and_endless_ones_refused(tmp_path: Path) -> None:
    Image.new("L", (12_000, 9_000), 90).save(tmp_path / "a.jpg")
    assert (read(tmp_path / "a.jpg", 28).int() - 90).abs().max() <= 1
    Image.new("L", (1, 1)).save(tmp_path / "b.bmp")
    header = bytearray((tmp_path / "b.bmp").read_bytes())
    for side in (12_500, 20_000):  # above our limit, and above Pillow's
        header[18:26] = struct.pack("<ii", side, side)
        (tmp_path / "b.bmp").write_bytes(header)
        reason = read_squares([tmp_path / "b.bmp"], 28)[1][0]
        assert reason.startswith("too large: ") and reason.endswith("more than 150,000,000 pixels")


def test_file_that_would_start_another_program_is_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert read_squares([tmp_path / "a.png"], 28)[1] == {0: "no picture that Pillow reads: save it as PNG or JPEG"}


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_left_out_is_named_once_and_counted(
    on_disk: bool, flat: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_disk:
        monkeypatch.setattr(image_folder, "IN_MEMORY", 0)
    whole = (flat / "ants" / "000.png").read_bytes()
    (flat / "ants" / "000.png").write_bytes(whole[: len(whole) // 2])
    (flat / "bees" / "000.png").write_text("hello")
    for name in (".DS_Store", "bees/.hidden.png", "bees/a.HEIC", "bees/b.heic", "bees/notes", "stray.png"):
        (flat / name).write_bytes(b"")
    paint(flat / "__MACOSX", numbers(3))
    data = ready(flat)
    for _ in range(2):
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        assert sum(len(labels) for loader in loaders for _, labels in loader) == 48
    lines = capsys.readouterr().err.splitlines()
    assert "Passed over: 2 files that are no pictures, or of no class (1 no suffix, 1 .png)" in lines
    assert sum("ants/000.png: can't be read: " in line for line in lines) == 1
    for name in ("000.png", "a.HEIC", "b.heic"):
        assert sum(f"bees/{name}: no picture that Pillow reads" in line for line in lines) == 1
    assert sum(line.startswith("  ") for line in lines) == 4


def test_copies_of_training_pictures_among_the_others_are_named(
    flat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ready(flat)
    assert capsys.readouterr().err == ""
    trained, tested = (data.pictures[part][0].file for part in ("train", "test"))
    shutil.copy(trained, tested)
    ready(flat)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Twice: 1 validation and test pictures are training pictures as well"
    assert lines[1:] == [f"  {tested.relative_to(flat)} is {trained.relative_to(flat)}"]


# ---- Batches


def test_pictures_that_stay_on_disk_make_the_same_batches(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = ready(flat)
    monkeypatch.setattr(image_folder, "IN_MEMORY", 1_000_000)
    assert isinstance(ready(flat).train_set, image_folder.Images)
    monkeypatch.setattr(image_folder, "IN_MEMORY", 100_000)
    on_disk = ready(flat)
    assert not isinstance(on_disk.train_set, image_folder.Images)
    for part in PARTS:
        one, other = (getattr(data, f"{part}_dataloader")() for data in (in_memory, on_disk))
        assert same(batches(one), batches(other))
    stopped, resumed = on_disk.train_dataloader(), on_disk.train_dataloader()
    next(iter(stopped))
    resumed.load_state_dict(stopped.state_dict())
    assert same(batches(resumed), batches(in_memory.train_dataloader())[1:])
    for picture in on_disk.pictures["train"]:
        picture.file.write_text("hello")
    with pytest.raises(UserError, match="a picture that can be read in each batch\ngot none of 16"):
        next(iter(resumed))


@pytest.mark.parametrize("part", ["test", "predict"])
def test_processes_share_the_pictures_without_a_repeat_or_a_gap(part: str, flat: Path) -> None:
    data = ready(flat, "fit" if part == "test" else part)
    seen = []
    for rank in range(3):
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        for batch in getattr(data, f"{part}_dataloader")():
            images = batch[0] if part == "test" else batch
            seen += [tuple(pixel) for pixel in images[:, :, 14, 14].tolist()]
    assert len(seen) == len(set(seen)) == len(data.pictures[part])


def test_augmentation_crops_and_mirrors_each_picture_anew_in_training_only(flat: Path) -> None:
    data = ready(flat, augment=True)
    batch = next(iter(data.train_dataloader()))
    data.trainer = SimpleNamespace(training=False)
    assert data.on_after_batch_transfer(batch, 0) is batch
    data.trainer = SimpleNamespace(training=True)
    images, labels = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(images, batch[0]) and torch.equal(labels, batch[1])  # of one colour each: nothing comes in


def test_crops_are_a_part_of_the_picture_and_half_are_mirrored() -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8)  # 64 columns
    picture = torch.stack([ramp.expand(64, 64), ramp.view(-1, 1).expand(64, 64), ramp.expand(64, 64)])
    images = picture.expand(400, -1, -1, -1)
    crops = crops_and_mirrors(images).float()
    across, down = crops[:, 0, 0, -1] - crops[:, 0, 0, 0], crops[:, 1, -1, 0] - crops[:, 1, 0, 0]
    assert crops.shape == images.shape and len(across.unique()) > 100
    assert 150 < int((across < 0).sum()) < 250 and bool((down > 0).all())
    area = across.abs() * down / 252**2
    assert area.min() > 0.06 and area.max() <= 1 and 0.4 < area.mean() < 0.65


# ---- To predict


def test_pictures_to_predict_need_no_classes(flat: Path) -> None:
    data = ready(flat / "bees", "predict")
    assert data.class_names == [] and names(data, "predict") == numbers(20)
    (images,) = data.predict_dataloader()
    assert images.shape == (20, 3, 28, 28) and images[:, 1, 14, 14].tolist() == list(range(200, 220))
    assert names(ready(flat / "bees" / "003.png", "predict"), "predict") == ["."]


@pytest.mark.parametrize("on_disk", [False, True])
def test_answers_go_to_a_table_the_screen_and_a_contact_sheet(
    on_disk: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_disk:
        monkeypatch.setattr(image_folder, "IN_MEMORY", 0)
    paint(tmp_path / "new", ["=1+1.png", "broken.png"], (250, 0, 0))
    (tmp_path / "new" / "broken.png").write_text("hello")
    paint(tmp_path / "new" / "bees", ["b.png"], (0, 0, 250))
    paint(tmp_path / "new" / "ants", ["a.png"], (0, 250, 0))
    sheet, table = tmp_path / "new" / "seen.png", tmp_path / "predictions.csv"
    for _ in range(2):  # the second time it replaces its own sheet, and doesn't classify it
        data = ready(tmp_path / "new", "predict", save_seen=str(sheet))
        assert sum(len(images) for images in data.predict_dataloader()) == 3
        assert not data.tell(torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]), table, ["ants", "bees"])
    first, ant, bee, unread = rows(table)
    told = {"label": "", "predicted": "ants", "second": "bees", "remark": "", "pants": "0.900000", "pbees": "0.100000"}
    assert first == {"file": "'=1+1.png", **told}
    assert (bee["file"], bee["label"], bee["predicted"]) == ("bees/b.png", "bees", "ants")
    assert unread["file"] == "broken.png" and "no picture that Pillow reads" in unread["remark"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == "=1+1.png ants 90.0 % bees (10.0 %)".split()
    assert lines[2].split() == "ants/a.png ants 70.0 % bees (30.0 %)".split() and lines[3].endswith("it is bees")
    assert lines[5] == "Accuracy       50.00 % of 2 whose class is known"
    with Image.open(sheet) as picture:
        assert [picture.getpixel((x, 60)) for x in (60, 180, 300)] == [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


# ---- Refusals


def broken(folder: Path) -> None:
    paint(folder, [])
    for name in numbers(4):
        (folder / name).write_text("hello")


LAYOUTS = {
    "none": ([], "expected folders of classes in .*: CLASS/\\*.jpg, or train/CLASS/\\*.jpg .*\ngot none"),
    "one": (["a"], "expected two classes or more in .*\ngot one: a\nmake a folder"),
    "too deep": (["all/a", "all/b"], "got one: all\ngive --data.path .*all"),
    "few": (["a", "b:2"], "expected more than 2 pictures of each class\ngot 2 of b"),
    "empty": (["a", "b:0"], "expected more than 2 pictures of each class\ngot 0 of b"),
    "others": (["train/a", "train/b", "test/a", "test/c"], "in .*test the classes of training: a, b\ngot others: c"),
    "unlabelled": (["train/a", "train/b", "test"], "expected folders of classes in .*test: .*\ngot none"),
    "empty part": (
        ["train/a", "train/b", "val/a:0", "val/b:0"], "expected pictures in each part's folder\ngot none in .*val"
    ),
    "nothing": (["a", "b!"], "expected pictures that can be read for each class to train on\ngot none of b"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_cannot_be_trained_on_are_refused_in_three_lines(case: str, tmp_path: Path) -> None:
    folders, message = LAYOUTS[case]
    for folder in folders:
        if folder.endswith("!"):
            broken(tmp_path / folder[:-1])
        else:
            name, _, count = folder.partition(":")
            paint(tmp_path / name, numbers(int(count or 4)))
    with pytest.raises(UserError, match=message) as refused:
        ready(tmp_path)
    assert str(refused.value).count("\n") == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"save_seen": "a.txt"}, "expected a .png for --data.save_seen"),
    ({"save_seen": "flat/ants/000.png"}, "which exists and is something else"),
    ({"save_seen": "a.png", "stage": "fit"}, "expected --data.save_seen with predict\ngot with fit"),
    ({"train_size": 100, "stage": "fit"}, "expected a train_size up to 34\ngot 100"),
    ({"val_size": 0.84, "stage": "fit"}, "expected more than 20 pictures of each class\ngot 20 of ants"),
    ({"val_size": 0.9, "stage": "fit"}, "expected val_size and test_size below 1 together\ngot 1.05"),
    ({"train_size": 2, "stage": "fit"}, "expected a train_size of 3 and more, a picture of each class\ngot 2"),
    ({"val_size": 1}, "expected shares of the pictures, below 1\ngot val_size 1, test_size 0.15"),
])  # fmt: skip
def test_settings_that_cannot_be_kept_are_refused(
    settings: dict[str, object], message: str, flat: Path, folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        ready(flat, **{"stage": "predict", **settings})  # type: ignore[arg-type]


def test_contact_sheet_of_thousands_is_refused(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MOST_SEEN", 40)
    with pytest.raises(UserError, match="expected up to 40 pictures for --data.save_seen\ngot 50"):
        ready(flat, "predict", save_seen="seen.png")


@pytest.mark.parametrize(("path", "stage", "message"), [
    ("", "fit", "expected a folder of pictures at --data.path\ngot an empty path"),
    ("nowhere", "fit", "expected pictures at --data.path\ngot nothing: nowhere"),
    ("a.png", "fit", "expected folders of classes in a.png: .*\ngot none"),
    ("nowhere", "predict", "expected pictures at --data.path\ngot nothing: nowhere"),
    (".", "predict", "expected pictures at --data.path\ngot none in ."),
])  # fmt: skip
def test_paths_without_pictures_are_refused(path: str, stage: str, message: str, folder: Path) -> None:
    if path == "a.png":
        paint(folder, ["a.png"])
    with pytest.raises(UserError, match=message):
        ready(path, stage)  # type: ignore[arg-type]
