"""Files written whole or not at all, and read without running anything in them."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import torch

from mnist_lightning.errors import UserError


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[IO[Any]]:
    """Opens a binary file that takes the place of `path` only when the block ends without an exception.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and are renamed: a reader, or a machine
    that loses power, sees the old file or the new one.

    Raises:
        OSError: the folder can't be written or the disk is full; an older file at `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())  # NamedTemporaryFile makes 0600: colleagues couldn't read the result
            file.close()  # Windows neither renames nor deletes an open file
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
    if os.name == "posix":  # the rename itself is only lasting once the folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_safely(path: Path, expected: str, remedy: str, map_location: Any = "cpu") -> Any:
    """torch.load with weights_only=True, so that a hostile file runs nothing; errors in words.

    Raises:
        UserError: there is no such file, or torch can't read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, in files that are no pickles
            if is_zipfile(path):
                with ZipFile(path) as file:  # torch writes the checksums but reads on over a flipped bit
                    if file.testzip():
                        raise ValueError("checksum")
            return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(expected, f"no such file: {path}", remedy) from error
    except IsADirectoryError as error:
        raise UserError(expected, f"a folder: {path}", remedy) from error
    except PermissionError as error:
        raise UserError(expected, f"a file without read permission: {path}", remedy) from error
    except Exception as error:  # torch.load answers damaged bytes with a dozen kinds of exception
        raise UserError(expected, f"{path}, which is damaged or something else", remedy) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
