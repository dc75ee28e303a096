"""What test_reliability.py runs in child processes: a command, a fault that strikes in it, awkward models and data."""

import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest.mock import DEFAULT, Mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LambdaLR, SequentialLR

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.runs import checkpoints
from mnist_lightning.sources import Digits, Split


def command(folder: Path, output: Path, environment: dict[str, str], args: list[str]) -> None:
    """`python -m mnist_lightning ARGS` in `folder`; what it prints goes to a file."""
    from mnist_lightning.__main__ import main

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["mnist_lightning", *args]
    main()


class Fault(Callback):
    """Strikes once, as the environment's FAULT says: "WHERE COUNT ACTION", for one process of several "... RANK".

    WHERE is a hook of Callback, or `save`, `fsync` or `replace`: in the middle of a checkpoint's bytes, before they
    reach the disk, before they get their name. COUNT 3 is the third time that this comes. ACTION is one of the methods
    below, or signals to send to this process: SIGKILL, SIGINT+SIGINT. Without FAULT nothing happens, so that a resumed
    run, whose checkpoint names this callback, is left alone.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.model: LightningModule | None = None
        if "FAULT" not in os.environ:
            return
        where, count, self.action, *rank = os.environ["FAULT"].split()
        self.countdown = int(count)
        if rank and rank[0] != os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")):
            return
        if where == "save":
            whole = checkpoints.write_whole

            @contextmanager
            def half(path: Path) -> Iterator[IO[Any]]:
                with whole(path) as file:
                    yield file
                    if self.countdown == 1:
                        file.truncate(file.tell() // 2)
                        file.flush()
                    self.strike()

            checkpoints.write_whole = half
        elif where in ("fsync", "replace"):
            # A mock, whose frames are the standard library's: what comes through a callback would be the callback's.
            setattr(os, where, Mock(wraps=getattr(os, where), side_effect=iter(lambda: self.strike() or DEFAULT, None)))
        else:
            setattr(self, where, self.strike)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.model = trainer, pl_module

    def strike(self, *_: Any) -> OSError | None:
        self.countdown -= 1
        if self.countdown == 0 and self.action.startswith("SIG"):
            for name in self.action.split("+"):
                os.kill(os.getpid(), signal.Signals[name])
        elif self.countdown == 0:
            return getattr(self, self.action)()
        return None

    def fail(self) -> None:
        raise RuntimeError("the fault of this test")

    def full(self) -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def limit(self) -> None:
        """From now on no file grows beyond 200,000 bytes: to the writer, a disk that fills."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    def lock(self) -> None:
        """From now on the folder of checkpoints is read-only; root, whom that doesn't stop, becomes somebody else."""
        os.chmod(self.trainer.checkpoint_callback.dirpath, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)

    def poison(self) -> None:
        assert self.model is not None
        next(self.model.parameters()).data.fill_(float("nan"))


class WithDropout(DigitClassifier):
    """A network that draws random numbers in each training step."""

    def __init__(self, optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3)) -> None:
        super().__init__(optimizer)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images / 255)


class PrimeDigits(MNISTDataModule):
    """scikit-learn's digits with 359 test images: a prime, so that no number of processes shares them evenly."""

    def load(self) -> Digits:
        digits = super().load()
        return digits._replace(test=Split(digits.test.images[:359], digits.test.labels[:359]))


class TwoOptimizers(DigitClassifier):
    """Optimizes by itself: two optimizers, a step of each after two batches, a schedule that it steps itself."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(torch.optim.SGD)
        self.automatic_optimization, self.lr = False, lr
        self.backbone, self.head = nn.Linear(49, 16), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(nn.functional.avg_pool2d(images / 255, 4).flatten(1)).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.lr_schedulers().step()
        return loss

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.backbone.parameters(), lr=self.lr, momentum=0.9)
        second = torch.optim.Adam(self.head.parameters(), lr=self.lr / 10)
        return [first, second], [ExponentialLR(first, 0.9)]


class WithBackbone(TwoOptimizers):
    """A small one to be unfrozen by Lightning's BackboneFinetuning."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return DigitClassifier.training_step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Scheduled(WithBackbone):
    """A schedule that the command line can't name."""

    def __init__(self, made_of: str) -> None:
        super().__init__()
        self.made_of = made_of

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        parts = [ConstantLR(optimizer, 0.5, total_iters=1), ExponentialLR(optimizer, 0.7)]
        schedules = {
            "ChainedScheduler": lambda: ChainedScheduler(parts),
            "LambdaLR": lambda: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
            "SequentialLR": lambda: SequentialLR(optimizer, parts, milestones=[1]),
        }
        return [optimizer], [schedules[self.made_of]()]
