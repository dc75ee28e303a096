"""RunLogger: TensorBoard events straight into a run's folder, and the same numbers in its metrics.csv."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from mnist_lightning.files import write_whole

EVENTS = "events.out.tfevents.*"


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, and metrics.csv. Lightning's CSVLogger would delete that of a resumed run.

    Args:
        run: the folder.
        resumed_after: the last step that was logged before the checkpoint of a resumed fit, which logs later ones anew.
        evaluated_at: the step of the checkpoint that is tested: Lightning would log it at step 0.
        hyperparameters: of the run, shown beside those that the model and the data save themselves.

    Attributes:
        rows: of metrics.csv, as {"step": 49, "train/loss": 0.5}.
    """

    def __init__(
        self,
        run: Path,
        resumed_after: int | None = None,
        evaluated_at: int | None = None,
        hyperparameters: dict[str, Any] | None = None,
    ) -> None:
        number = run.name.removeprefix("version_")
        version = int(number) if number.isdecimal() else run.name  # of a str the bar would show the last four letters
        super().__init__(save_dir=run.parent, name="", version=version, default_hp_metric=False)
        self.path, self.evaluated_at = run / "metrics.csv", evaluated_at
        self.hyperparameters = hyperparameters or {}
        self.shown: dict[str, Any] | None = None  # None until they are given
        self.run, self.older, self.logged = run, set(run.glob(EVENTS)), False
        rows = read_metrics(self.path)
        self.ours = rows is not None
        self.rows = [row for row in rows or [] if resumed_after is None or row["step"] <= resumed_after]

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged = True
        step = step if self.evaluated_at is None else self.evaluated_at
        # Lightning adds the epoch to each: a chart of its own, in front of all others.
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float, Tensor))}
        row = {"step": float(step or 0), **numbers}
        if self.evaluated_at is not None:
            row.pop("epoch", None)
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)
        if any(not name.endswith("_step") and not name.startswith("lr-") for name in numbers if name != "epoch"):
            self._write()  # not for each single batch

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        refused = status == "failed" and self.shown is None
        if not self.logged and (refused or self.evaluated_at is not None):  # nothing came of it: Lightning's file goes
            for file in set(self.run.glob(EVENTS)) - self.older:
                file.unlink()
        try:
            if self.rows:
                self._write()
        except OSError:
            if status != "failed":  # else it would hide what the fit failed of: a full disk, for example
                raise

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Joins the hyperparameters to val/acc and test/acc in the hparams tab.

        Lightning does that by logging a value for each metric at step 0, which then stands in the plots as if it had
        been measured; the tab needs the names alone.
        """
        if metrics is not None:  # given by a model of one's own
            return super().log_hyperparams(params, metrics, step)
        params = {**self.hyperparameters, **(vars(params) if isinstance(params, Namespace) else params)}
        shown = {
            key.replace("/init_args", "").removesuffix("/class_path"): value
            for key, value in flat(params).items()
            # Skip paths, and optimizer arguments left at zero or None.
            if not key.startswith("_") and key not in ("data_dir", "mirrors") and (value or "/" not in key)
        }
        if self.shown is not None:  # a fit's final test brings them again
            if more := sorted(shown.keys() - self.shown):
                print(f"TensorBoard: hyperparameters can be given once; not shown: {', '.join(more)}", flush=True)
            return
        self.shown = shown
        for summary in hparams_summaries(shown, {"val/acc": 0, "test/acc": 0}):
            self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        """Only flushes: the hparams.yaml that Lightning writes here would repeat config.yaml."""
        self.experiment.flush()

    def _write(self) -> None:
        if not self.ours:
            return
        names = sorted({name for row in self.rows for name in row} - {"step", "epoch"})
        with write_whole(self.path, text=True) as file:
            table = csv.DictWriter(file, ["step", "epoch", *names])
            table.writeheader()
            table.writerows({**row, "step": int(row["step"])} for row in self.rows)


def flat(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys like optimizer/lr; what TensorBoard can't show as text."""
    result: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float)) else str(value or "")
    return result


def read_metrics(path: Path) -> list[dict[str, float]] | None:
    """The rows of a metrics.csv; [] if there is none; None if it isn't this project's."""
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            rows = list(table)
        whole = all(row["step"] and None not in row for row in rows)  # None: the name of what is too much in a row
        whole = whole and all(float(row["step"]).is_integer() for row in rows)  # neither nan nor inf is
        if (table.fieldnames or [])[:2] != ["step", "epoch"] or not whole:
            return None
        return [{name: float(value) for name, value in row.items() if value} for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return None
