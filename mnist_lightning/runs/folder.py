"""A run's folder, lightning_logs/<Model>/version_N: claimed, trained in by one process, found again, given back."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mnist_lightning.errors import UserError

LOGS = "lightning_logs"


def claim(root: Path, name: str) -> Path:
    """Makes and returns `root`/lightning_logs/`name`/version_N for the next free N.

    Lightning only looks for a free number; making the folder decides between two runs that look at the same moment.

    Raises:
        UserError: `root`/lightning_logs/`name` can't be made: a file or a broken link is in its place, or `root` is
            read-only.
    """
    folder = root / LOGS / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file, or a link to a folder that is gone" if is_file else error.strerror
        remedy = "move it away, or choose another folder: --trainer.default_root_dir FOLDER."
        raise UserError("a folder for runs", f"{reason}: {shown_path(Path(error.filename))}", remedy) from error
    taken = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        run = folder / f"version_{number}"
        try:
            run.mkdir()
            return run
        except FileExistsError:
            number += 1


@contextmanager
def training_in(run: Path) -> Iterator[None]:
    """Keeps other processes from training the same run, until the block or this process ends, however it ends.

    The operating system holds the lock: the file that it leaves behind means nothing.

    Raises:
        UserError: another process trains this run.
    """
    lock = FileLock(run / ".training.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        got, remedy = shown_path(run), "wait until that has ended, or start a new run."
        raise UserError("a run that no other process is training", got, remedy) from error
    except NotImplementedError:  # by some network file systems
        print(f"WARNING: {shown_path(run)} can't be locked: let no second fit go on in it.", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def unclaim(run: Path) -> None:
    """Removes a run that came to nothing, with the folders around it that hold nothing else. Checkpoints stay."""
    if any(run.glob("checkpoints/*.ckpt")):
        return
    shutil.rmtree(run, ignore_errors=True)
    with suppress(OSError):  # another run is there
        run.parent.rmdir()
        run.parent.parent.rmdir()


def find_checkpoint(name: str, root: Path = Path(), model: str | None = None) -> Path:
    """The checkpoint of that name: a file; or best or last, of the newest run under `root`: of `model`, or of any.

    Raises:
        UserError: there is no run.
    """
    if name not in ("best", "last"):
        return Path(name)
    names = [model, f"{model}-digits"] if model else ["*"]
    found = [path for name_ in names for path in (root / LOGS).glob(f"{name_}/version_*/checkpoints/*.ckpt")]
    found = [path for path in found if path.stem in ("best", "last") and path.is_file()]  # no link to nothing
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or not newest.with_name(f"{name}.ckpt").is_file():
        expected = f"a run of {model or 'a model'} with a checkpoint under {root / LOGS}"
        raise UserError(expected, "none", "train one with `fit`, or name the file: --ckpt_path FILE.")
    return newest.with_name(f"{name}.ckpt")


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, also by a link or a relative path; None for one that lies elsewhere."""
    folder = checkpoint.resolve().parent
    is_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
    return folder.parent if is_run else None


def results_of(checkpoint: Path) -> Path:
    """Where results of a checkpoint go: into its run; for one from elsewhere into a folder beside it."""
    return run_of(checkpoint) or checkpoint.parent / f"{checkpoint.stem}-results"


def shown_path(path: Path) -> str:
    """As a person would type it: relative where that is shorter."""
    try:
        return min(str(path), os.path.relpath(path), key=len)
    except OSError:  # the current folder was deleted
        return str(path)


def quoted(path: Path) -> str:
    """The same as one word of a command that can be pasted."""
    return shlex.quote(shown_path(path))
