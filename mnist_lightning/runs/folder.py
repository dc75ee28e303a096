"""A run's folder, lightning_logs/<Model>/version_N: claimed by one process, found again, removed if it stays empty."""

import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from mnist_lightning.errors import UserError

LOGS = "lightning_logs"


def claim(root: Path, name: str) -> Path:
    """Makes and returns `root`/lightning_logs/`name`/version_N for the next free N.

    Lightning only looks for a free number; making the folder decides between two runs that look at the same moment.
    """
    folder = root / LOGS / name
    taken = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        run = folder / f"version_{number}"
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1


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
    found = [path for path in found if path.stem in ("best", "last")]
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
    return min(str(path), os.path.relpath(path), key=len)


def quoted(path: Path) -> str:
    """The same as one word of a command that can be pasted."""
    return shlex.quote(shown_path(path))
