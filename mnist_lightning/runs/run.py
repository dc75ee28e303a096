"""Run: the folder of a fit while it goes on; one that comes to nothing is given back."""

from pathlib import Path
from typing import Any

from mnist_lightning.runs.folder import unclaim


class Run:
    """A fit's folder, to be entered with `with`: where nothing says that it is worth keeping, a new one is removed.

    Args:
        folder: where config.yaml, checkpoints/, the events and metrics.csv go.
        fresh: whether it was made for this fit, by this process.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.folder, self.kept = folder, not fresh

    def keep(self) -> None:
        self.kept = True

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.kept:
            unclaim(self.folder)
