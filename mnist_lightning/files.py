"""Files written whole or not at all, downloaded with a check, and read without running anything in them."""

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4
from zipfile import ZipFile, is_zipfile

import torch

from mnist_lightning.errors import UserError

NETWORK_TIMEOUT = 10.0  # seconds to connect, and between two packets


@contextmanager
def write_whole(path: str | os.PathLike[str], text: bool = False) -> Iterator[IO[Any]]:
    """Opens a file that takes the place of `path` only when the block ends without an exception.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and are renamed: a reader, or a machine
    that loses power, sees the old file or the new one.

    Args:
        text: whether str is written, as UTF-8 with the line ends that it has, or bytes.

    Raises:
        OSError: the folder can't be written or the disk is full; an older file at `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8") if text else open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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


def download(urls: Sequence[str], path: Path, known_hash: str, remedy: str) -> None:
    """Tries the addresses in turn, unless the file is there. Of several processes one downloads; the others wait.

    Args:
        known_hash: of the file, as md5:... or sha256:...
        remedy: the last line of the error.

    Raises:
        UserError: none has the right file, or the folder can't be written.
    """
    import pooch
    import requests
    from filelock import FileLock

    def fetch(url: str, output_file: str, _: object) -> None:
        print(f"Downloading {url}", file=sys.stderr)
        http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=NETWORK_TIMEOUT)
        http(url, output_file, None)
        os.chmod(output_file, 0o644)  # pooch makes it 0600: the folder's other users couldn't read it

    pooch.get_logger().setLevel("WARNING")  # it would announce the download in its own words
    failures = []
    try:
        if path.is_file():
            algorithm, _, wanted = known_hash.partition(":")
            if hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest() == wanted:
                return
            failures.append(f"{path} (damaged)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".download.lock"):
            for url in urls:
                try:
                    pooch.retrieve(url, known_hash, path.name, path.parent, downloader=fetch)
                    return
                except (requests.RequestException, ValueError) as error:
                    failures.append(f"{url} ({_reason(error)})")
    except OSError as error:  # permissions, a read-only or full disk, a file where a folder should be
        raise UserError(f"a folder to read and write: {path.parent}", str(error), remedy) from error
    expected = f"an intact {path.name} in {path.parent} ({known_hash}), or a network to download it"
    raise UserError(expected, "; ".join(failures), remedy)


def _reason(error: BaseException) -> str:
    """The first sentence of what went wrong first: requests wraps "timed out" in three more exceptions."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
