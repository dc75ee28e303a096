"""Models, data and callbacks as people write them: what is trained is tested, resumed and loaded again."""

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image, ImageDraw
from running import Few, command, refused
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from mnist_lightning import ConvNet, DigitClassifier, ResNet18, load_model
from mnist_lightning.commands.cli import run
from mnist_lightning.runs.logger import RunLogger
from mnist_lightning.sources import load_digits

# LightningCLI warns of a default that it can't write down, Lightning of a model without some of its steps.
pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = ("--pictures", "false", "--trainer.max_epochs", 1)
LOWEST = ("--monitor", "val_loss", "--monitor_mode", "min")


def own(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


class Fewer(Few):
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_set = Subset(self.train_set, range(32))  # type: ignore[assignment]


class Folder(LightningDataModule):
    def __init__(self, root: Path) -> None:
        super().__init__()

    def loader(self) -> Any:
        images, labels = load_digits().test
        return DataLoader(TensorDataset(images[:40], labels[:40]), 16)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        images, labels = load_digits().test
        return iter(TensorDataset(images[:40], labels[:40]))


class Stream(Folder):
    def __init__(self) -> None:
        super().__init__(Path())

    def test_dataloader(self) -> Any:
        return DataLoader(Endless(), 16)


class Streams(Stream):
    def train_dataloader(self) -> Any:
        return self.test_dataloader()


class Named(Stream):
    def test_dataloader(self) -> Any:
        return {"digits": self.loader()}


class Odd(Stream):
    """Batches that a DigitClassifier's own steps don't take."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def loader(self) -> Any:
        images, labels = load_digits().test
        rows = {
            "one-hot": TensorDataset(images, F.one_hot(labels).float()), "int32": TensorDataset(images, labels.int()),
            "three": TensorDataset(images, labels, labels), "dict": [{"image": images[0], "label": labels[0]}],
        }  # fmt: skip
        return DataLoader(rows[self.kind], batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Pool(Enum):
    MAX = "max"
    MEAN = "mean"


class Pooled(ConvNet):
    def __init__(self, pool: Pool = Pool.MAX) -> None:
        super().__init__()


class Deep(ConvNet):
    def __init__(self, dropout: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Late(DigitClassifier):
    def __init__(self) -> None:
        super().__init__(lambda params: Adam(params, lr=1e-3))
        self.net: Any = None

    def configure_model(self) -> None:
        self.net = self.net or nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images / 255)


class Lazy(Late):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


class Counting(ConvNet):
    """What it answers depends on a state beside the weights."""

    epochs = 0

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.epochs += 1

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).roll(self.epochs, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["epochs_counted"] = self.epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs = checkpoint["epochs_counted"]


class Partly(ConvNet):
    """Doesn't save what is frozen, as Lightning documents it."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "conv1" not in name}


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"calls": 3}


class WithExtra(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.extra = Extra()


class Fine(ResNet18):
    """The usual change for small images: the first convolution keeps the size."""

    def __init__(self) -> None:
        super().__init__("none", 28, trainable_layers=5, optimizer=lambda params: Adam(params, lr=1e-3))
        self.backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images / 255)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy_test", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=1e-3)


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [Adam(self.parameters(), lr=1e-3), SGD(self.parameters(), lr=1e-3)]


class Stops(ConvNet):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 3:
            self.trainer.should_stop = True


class Fails(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("of one's own")


class Misread(Callback):
    def on_train_epoch_end(self, trainer: Trainer) -> None:  # type: ignore[override]
        pass


class KeepsAPath(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("x")}


def last() -> dict[str, Any]:
    (path,) = Path("lightning_logs").rglob("last.ckpt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("typed", [
    f"--data {own(Folder)} --data.root here --model {own(Pooled)} --model.pool MEAN",
    f"--data {own(Fewer)} --model {own(Deep)}",
    *(f"--data {own(Few)} --model {own(model)}" for model in (Late, Lazy, Counting, Partly, WithExtra)),
    f"--data {own(Fewer)} --model ResNet18 --model.weights none --model.image_size 28",
    f"--data {own(Streams)}",
])  # fmt: skip
def test_trained_model_is_tested_and_resumed(typed: str, folder: Path) -> None:
    fitted = command("fit", *typed.split(), *QUIET)
    tested = command("test", "--ckpt_path", "best", "--pictures", "false")
    assert fitted.partition("Test accuracy")[2][:8] == tested.partition("Test accuracy")[2][:8] != ""
    before = last()["global_step"]
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2, "--pictures", "false")
    assert last()["global_step"] == 2 * before


def test_ones_own_data_may_have_moved(folder: Path) -> None:
    command("fit", "--data", own(Folder), "--data.root", "here", *QUIET)
    Path("there").mkdir()
    command("fit", "--ckpt_path", "last", "--data.root", "there", "--trainer.max_epochs", 2)
    assert last()["epoch"] == 1
    assert "--data.root as in the checkpoint: there got elsewhere" in refused(
        "fit", "--ckpt_path", "last", "--data.root", "elsewhere"
    )


def test_replaced_stem_is_trained(folder: Path) -> None:
    torch.manual_seed(0)
    before = Fine().backbone.conv1.weight.detach().clone()
    assert run(["fit", "--data", own(Few), "--model", own(Fine), *map(str, QUIET)]) == 0
    assert not torch.equal(last()["state_dict"]["backbone.conv1.weight"], before)


def test_subclass_that_hands_its_arguments_on_is_loaded_from_python(folder: Path, quiet: Any) -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(Deep(dropout=0.2, num_classes=11), Few())
    trainer.save_checkpoint("deep.ckpt")
    again = load_model("deep.ckpt")
    assert (type(again), again.num_classes) == (Deep, 11)
    assert Deep.load_from_checkpoint("deep.ckpt", weights_only=True).hparams["dropout"] == 0.2


@pytest.mark.parametrize("typed, steps", [
    ("--trainer.max_epochs 3 --trainer.val_check_interval 2 --trainer.callbacks EarlyStopping "
     "--trainer.callbacks.monitor val/acc --trainer.callbacks.mode max --trainer.callbacks.stopping_threshold -1", 2),
    (f"--model {own(Stops)}", 3), (f"--model {own(TwoOptimizers)} {' '.join(LOWEST)} --trainer.max_steps 3", 4),
])  # fmt: skip
def test_fit_that_stops_in_mid_epoch_has_its_last(typed: str, steps: int, folder: Path) -> None:
    command("fit", "--data", own(Few), *QUIET, *typed.split())
    assert last()["global_step"] == steps


def test_metrics_under_ones_own_names_are_shown_and_photos_need_probabilities(folder: Path) -> None:
    fitted = command("fit", "--data", own(Few), "--model", own(Plain), *LOWEST, *QUIET)
    assert "Test           accuracy_test 0." in fitted and "Your digits" not in fitted
    assert "Test           accuracy_test 0." in command("test", "--ckpt_path", "best", "--pictures", "false")
    photo = Image.new("L", (60, 60), 255)
    ImageDraw.Draw(photo).line((30, 8, 30, 50), 0, 5)
    photo.save("p.png")
    said = refused("predict", "--ckpt_path", "best", "--data", "Photos", "--data.path", "p.png")
    assert "{'probabilities': (B, C)} for Photos got Plain" in said


@pytest.mark.parametrize("data, said", [(Stream, "on the test images"), (Named, "on a part of the test images")])
def test_other_test_loaders_are_told_apart(data: type, said: str, folder: Path) -> None:
    assert said in command("fit", "--data", own(data), *QUIET, "--trainer.limit_test_batches", 1)


def test_schedule_of_a_stream_needs_a_number_of_steps(folder: Path) -> None:
    typed = ("--data", own(Streams), *QUIET, "--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", 0.1)
    assert "where the data is a stream" in refused("fit", *typed)
    command("fit", *typed, "--trainer.max_steps", 4)
    assert last()["global_step"] == 3  # an epoch ends first


def test_run_that_failed_after_an_epoch_keeps_what_it_measured(folder: Path) -> None:
    typed = (*QUIET[:2], "--trainer.max_epochs", "2", "--trainer.enable_checkpointing", "false")
    with pytest.raises(RuntimeError, match="of one's own"):
        run(["fit", "--data", own(Few), *typed, "--trainer.callbacks", own(Fails)])
    assert len(list(Path("lightning_logs").rglob("metrics.csv"))) == 1


def test_callback_of_another_signature_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        run(["fit", "--data", own(Few), *map(str, QUIET), "--trainer.callbacks", own(Misread)])


DIGITS = "--data.source digits --data.train_size 80"


@pytest.mark.parametrize("typed, message", [
    (f"{DIGITS} --config ./x.yaml --trainer.max_epoch 3", "expected a valid --config got .*x.yaml"),
    (f"{DIGITS} --trainer.max_epoch 3 --trainer.default_root_dir ./here", "got --trainer.max_epoch did you mean"),
    (f"{DIGITS} --data.val_size 0 --model.scheduler ReduceLROnPlateau --model.scheduler.monitor val/loss",
     "got val/loss, with"),
    (f"{DIGITS} --data.val_size 0 --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss",
     "got val/loss, with"),
    (f"{DIGITS} --trainer.callbacks EarlyStopping --trainer.callbacks.monitor nothing",
     "a metric to monitor got nothing; the model logs train/acc, train/loss, train/loss_step, val/acc, val/loss name"),
    (f"{DIGITS} --monitor train/f1", "got train/f1; the model logs train/acc"),
    (f"--data {own(Odd)} --data.kind one-hot", "class numbers as labels, int64 .B,. got float32 .8, 10. from"),
    (f"--data {own(Odd)} --data.kind int32", "got int32 .8,. from Odd"),
    (f"--data {own(Odd)} --data.kind three", "pairs .images, labels. got a list of 3 from Odd"),
    (f"--data {own(Odd)} --data.kind dict", "got a dict of 2 from Odd return pairs, or"),
])  # fmt: skip
def test_what_cannot_work_is_refused_and_leaves_nothing(typed: str, message: str, folder: Path) -> None:
    assert re.search(message, refused("fit", *typed.split(), *QUIET))


@pytest.mark.parametrize("typed, message", [
    ("--data.source digits --data.train_size 17 --data.batch_size 16 --model ResNet18 --model.weights none "
     "--model.image_size 28 --model.normalize_features true",
     "two images or more in each training batch got one change --data.batch_size"),
    (f"{DIGITS} --model.scheduler StepLR --model.scheduler.step_size 0", "got .*modulo by zero"),
    (f"--data {own(Few)} --trainer.callbacks {own(KeepsAPath)} --trainer.max_epochs 1",
     r"expected plain values and tensors .*got an object of pathlib\.\w+ "),
])  # fmt: skip
def test_what_fails_in_training_is_explained_and_leaves_no_checkpoint(typed: str, message: str, folder: Path) -> None:
    with redirect_stderr(io.StringIO()) as error:
        assert run(["fit", *QUIET[:2], *typed.split()]) == 2
    assert re.search(message, " ".join(error.getvalue().split()))
    assert not list(Path().rglob("last.ckpt"))


def test_learning_rate_is_found_for_a_model_without_such_an_option(folder: Path) -> None:
    found = command("fit", "--data.source", "digits", "--lr_find", "true", "--model", own(Plain), *LOWEST)
    assert re.match(r"A learning rate to try: [\d.e-]+; nothing was trained.\n", found)


def test_schedule_of_a_fixed_length_is_not_outlived(folder: Path) -> None:
    command("fit", "--data", own(Few), *QUIET, *"--model.scheduler OneCycleLR --model.scheduler.max_lr 0.1".split())
    with redirect_stderr(io.StringIO()) as error:
        assert run(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 2
    assert "expected a fit as long as its OneCycleLR, 5 steps\n       got a fit of 10 steps\n" in error.getvalue()
    assert "to train longer, start a new run" in command("fit", "--ckpt_path", "last")


def test_plateau_waits_for_the_validations(folder: Path) -> None:
    typed = "--trainer.check_val_every_n_epoch 2 --model.scheduler ReduceLROnPlateau --model.scheduler.monitor val/loss"
    command("fit", "--data", own(Few), *QUIET, *typed.split(), "--trainer.max_epochs", 3)
    assert last()["epoch"] == 2


def test_copy_of_last_alone_gets_a_best(folder: Path) -> None:
    command("fit", "--data", own(Few), *QUIET, "--model.optimizer", "SGD", "--model.optimizer.lr", 1e-30)
    (path,) = Path("lightning_logs").rglob("last.ckpt")
    Path("moved").mkdir()
    path.rename("moved/last.ckpt")
    command("fit", "--ckpt_path", "moved/last.ckpt", "--trainer.max_epochs", 2, "--trainer.default_root_dir", "new")
    assert len(list(Path("new").rglob("best.ckpt"))) == 1


def test_logger_takes_what_tensorboards_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tmp_path)
    logger.log_hyperparams({"a": 1}, metrics={"hp/x": 0})
    logger.log_metrics({"parts": {"a": 1.0}, "x": 2.0}, 3)
    assert logger.rows == [{"step": 0.0, "hp/x": 0.0}, {"step": 3.0, "x": 2.0}]
    logger.log_hyperparams({"b": 1})
    logger.log_hyperparams({"b": 1, "c": 2})
    assert capsys.readouterr().out == "TensorBoard: hyperparameters can be given once; not shown: c\n"
