"""A run's folder, lightning_logs/<Model>/version_N: claimed by one process, found again, logged into."""

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _flatten_dict
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole

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
    """Removes a run that came to nothing, with the folders around it that hold nothing else."""
    shutil.rmtree(run, ignore_errors=True)
    for folder in (run.parent, run.parent.parent):
        try:
            folder.rmdir()
        except OSError:  # another run is there
            return


def newest_checkpoint(root: Path, which: str, model: str | None) -> Path:
    """The `which` (best or last) checkpoint of the newest run: of `model`, or of any.

    Raises:
        UserError: there is none.
    """
    names = [f"{model}", f"{model}-digits"] if model else ["*"]
    lasts = [path for name in names for path in (root / LOGS).glob(f"{name}/version_*/checkpoints/last.ckpt")]
    newest = max(lasts, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or not newest.with_name(f"{which}.ckpt").is_file():
        raise UserError(
            f"a run of {model or 'a model'} with a checkpoint under {root / LOGS}",
            "none",
            "train one with `fit`, or name the file: --ckpt_path FILE.",
        )
    return newest.with_name(f"{which}.ckpt")


def find_checkpoint(name: str) -> Path:
    """The checkpoint of that name: a file; or best or last, of the newest run under the current folder.

    Raises:
        UserError: there is no run.
    """
    return newest_checkpoint(Path(), name, None) if name in ("best", "last") else Path(name)


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to; for a checkpoint from elsewhere the folder that it lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


class RunLogger(TensorBoardLogger):
    """TensorBoard events straight into a run's folder, and the same numbers in its metrics.csv.

    Lightning's CSVLogger would delete the metrics.csv of the run that is resumed.

    Args:
        run: the folder.
        steps: so many optimizer steps a resumed fit starts from; it will take those after them again.

    Attributes:
        rows: of metrics.csv, as {"step": 49, "train/loss": 0.5}.
    """

    def __init__(self, run: Path, steps: int | None = None) -> None:
        super().__init__(save_dir=run.parent, name="", version=run.name, default_hp_metric=False)
        self.path = run / "metrics.csv"
        self.rows = [row for row in read_metrics(self.path) if steps is None or row["step"] < steps]

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        # Lightning adds the epoch to each: a chart of its own, in front of all others.
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
        row = {"step": float(step or 0), **{name: float(value) for name, value in metrics.items()}}
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)
        if any(name.startswith(("val/", "test/")) for name in row):
            self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self.rows:
            self._write()

    def _write(self) -> None:
        names = sorted({name for row in self.rows for name in row} - {"step", "epoch"})
        text = io.StringIO()
        table = csv.DictWriter(text, ["step", "epoch", *names])
        table.writeheader()
        table.writerows({**row, "step": int(row["step"])} for row in self.rows)
        with write_whole(self.path) as file:
            file.write(text.getvalue().encode())

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any) -> None:  # type: ignore[override]
        """Joins the hyperparameters to val/acc and test/acc in the hparams tab.

        Lightning does that by logging a value for each metric at step 0, which then stands in the plots as if it had
        been measured; the tab needs the names alone.
        """
        flat = _flatten_dict(params).items()
        shown = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in ((k.replace("/init_args", "").removesuffix("/class_path"), v) for k, v in flat)
            # Where the files are is no hyperparameter, and of an optimizer's arguments most are off.
            if not key.startswith("_") and key not in ("data_dir", "mirrors") and (value or "/" not in key)
        }
        writer = self.experiment._get_file_writer()
        for summary in hparams_summaries(shown, {"val/acc": 0, "test/acc": 0}):
            writer.add_summary(summary)

    def save(self) -> None:
        """Only flushes: the hparams.yaml that Lightning writes here would repeat config.yaml."""
        if self._experiment is not None:
            self._experiment.flush()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, or none where it isn't there or isn't one."""
    try:
        with path.open(newline="") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file) if row.get("step")]
    except (OSError, ValueError):
        return []


def shown_path(path: Path) -> str:
    """As a person would type it: relative where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
