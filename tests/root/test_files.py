"""write_whole: the old file or the new one, never half of one."""

import os
from pathlib import Path

import pytest

from mnist_lightning.files import write_whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "result.csv").write_bytes(b"old")
    return tmp_path / "result.csv"


def test_new_content_takes_the_place_of_the_old_when_the_block_ends(path: Path) -> None:
    with write_whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["result.csv"]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_in_the_block_leaves_the_old_file_alone(exception: type[BaseException], path: Path) -> None:
    with pytest.raises(exception), write_whole(path) as file:
        file.write(b"half of the n")
        raise exception
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["result.csv"]


def test_file_in_the_place_of_the_folder_is_an_oserror(path: Path) -> None:
    with pytest.raises(OSError, match="result.csv"), write_whole(path / "other.csv"):
        pass
    assert path.read_bytes() == b"old"


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if inode == tmp_path.stat().st_ino:
            steps.append("folder on disk")
        else:
            steps.append(f"{os.fstat(descriptor).st_size} bytes on disk")

    def replace(old: str, new: Path) -> None:
        steps.append("renamed" if file.closed else "renamed while open")  # Windows refuses that
        rename(old, new)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with write_whole(tmp_path / "result.csv") as file:
        file.write(b"new")
    assert steps == ["3 bytes on disk", "renamed", *(["folder on disk"] if os.name == "posix" else [])]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_file(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with write_whole(tmp_path / "result.csv"):
            pass
        assert os.umask(umask) == umask  # unchanged
    finally:
        os.umask(before)
    assert (tmp_path / "result.csv").stat().st_mode & 0o777 == mode
