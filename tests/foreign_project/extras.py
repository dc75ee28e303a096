"""One's own callbacks and logger."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger


class Diary(Callback):
    """Writes a line a training epoch.

    Args:
        path: the file.
    """

    def __init__(self, path: str = "diary.txt") -> None:
        self.path = Path(path)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.path.open("a") as file:
            print(trainer.current_epoch, trainer.global_step, file=file)


class Table(CSVLogger):
    """Lightning's CSVLogger, in a folder that is always the same."""

    def __init__(self, save_dir: str = "tables") -> None:
        super().__init__(save_dir, name="", version="")


class FailsLater(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("of one's own")


class Misread(Callback):
    """Takes less than Lightning passes."""

    def on_train_epoch_end(self, trainer: Trainer) -> None:  # type: ignore[override]
        pass


class KeepsAPath(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("x")}


class Rich(Callback):
    """As Lightning's RichProgressBar where that package isn't installed."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("RichProgressBar requires rich")
