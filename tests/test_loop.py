"""StepLoop leaves behind what Lightning's own loop leaves, and calls what that calls."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import Logger
from torch.optim import LBFGS, Adam
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.loop import HOOKS, StepLoop

SETTINGS = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 1, "log_every_n_steps": 2}


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Any, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class Heard(Callback):
    """Keeps which hooks of a step were called, at which step, and what the arguments were."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


def listen(name: str) -> Any:
    def hook(self: Heard, trainer: Any, model: Any, *args: Any) -> None:
        tensors = [arg.item() for arg in args if isinstance(arg, torch.Tensor)]
        outputs = [{k: v.item() for k, v in arg.items()} for arg in args if isinstance(arg, dict)]
        counts = [arg for arg in args if isinstance(arg, int)]
        self.calls.append((name, trainer.global_step, tensors, outputs, counts, trainer.is_last_batch))

    return hook


for hook_name in HOOKS:
    setattr(Heard, hook_name, listen(hook_name))


class Fit:
    """A fit on scikit-learn's digits, by StepLoop or by Lightning's own loop."""

    def __init__(
        self, own: bool, model: type[ConvNet] = ConvNet, arguments: Any = None, callback: Any = None, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.model, self.logger, self.heard = model(**(arguments or {})), Rows(), Heard()
        data = MNISTDataModule(source="digits", augment=1)
        self.trainer = Trainer(
            **{**SETTINGS, **settings},
            accelerator="cpu",
            num_sanity_val_steps=0,
            logger=self.logger,
            callbacks=[self.heard, LearningRateMonitor(), *([callback] if callback else [])],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.loop = StepLoop(self.trainer, self.trainer.min_steps, self.trainer.max_steps)
        if own:
            self.trainer.fit_loop.epoch_loop = self.loop
        self.trainer.fit(self.model, data)


def assert_alike(ours: Fit, lightnings: Fit) -> None:
    for name, value in lightnings.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name
    assert ours.heard.calls == lightnings.heard.calls
    assert ours.logger.rows == lightnings.logger.rows
    assert ours.trainer.fit_loop.state_dict() == lightnings.trainer.fit_loop.state_dict()
    ours_optimizer, theirs = (str(fit.trainer.optimizers[0].state_dict()) for fit in (ours, lightnings))
    assert ours_optimizer == theirs
    assert ours.trainer.callback_metrics == lightnings.trainer.callback_metrics


RECIPES: dict[str, Any] = {
    "SGD": {},
    "OneCycleLR": {"scheduler": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=20)},
    "Adam, StepLR": {"optimizer": lambda params: Adam(params), "scheduler": lambda optimizer: StepLR(optimizer, 1)},
    "LBFGS": {"optimizer": lambda params: LBFGS(params, max_iter=3)},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_leaves_what_lightnings_own_loop_leaves(recipe: str) -> None:
    ours, lightnings = (Fit(own, arguments=RECIPES[recipe]) for own in (True, False))
    assert ours.loop.plain
    assert_alike(ours, lightnings)
    assert len(ours.logger.rows) > 5 and len(ours.heard.calls) >= 6 * 10


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16-mixed"}, {"max_steps": 7}, {"val_check_interval": 2}, {"min_steps": 12, "max_epochs": 3}],
    ids=str,
)
def test_takes_the_trainers_settings(settings: dict[str, Any]) -> None:
    ours, lightnings = (Fit(own, **settings) for own in (True, False))
    assert ours.loop.plain
    assert_alike(ours, lightnings)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"profiler": "simple"},
        {"check_val_every_n_epoch": None},
    ],
    ids=str,
)
def test_leaves_what_is_not_plain_to_lightnings_own_loop(settings: dict[str, Any]) -> None:
    ours, lightnings = (Fit(own, **settings) for own in (True, False))
    assert not ours.loop.plain
    assert_alike(ours, lightnings)


def test_leaves_a_schedule_that_watches_a_metric_to_lightnings_own_loop() -> None:
    arguments = {"scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0)}
    ours, lightnings = (Fit(own, arguments=arguments) for own in (True, False))
    assert not ours.loop.plain
    assert_alike(ours, lightnings)


class WithHook(ConvNet):
    def on_after_backward(self) -> None:
        self.conv1.bias.grad = None


class WithBackward(ConvNet):
    def backward(self, loss: torch.Tensor) -> None:
        (2 * loss).backward()


class WithZeroGrad(ConvNet):
    def optimizer_zero_grad(self, *_: Any) -> None: ...


@pytest.mark.parametrize("model", [WithHook, WithBackward, WithZeroGrad])
def test_leaves_a_model_with_hooks_of_its_own_to_lightnings_own_loop(model: type[ConvNet]) -> None:
    ours, lightnings = (Fit(own, model) for own in (True, False))
    assert not ours.loop.plain
    assert_alike(ours, lightnings)


class Skips(ConvNet):
    """Returns a dict, and at every third step nothing: Lightning then makes no step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("own", loss, on_step=True, on_epoch=True)
        return None if batch_idx % 3 == 2 else {"loss": loss, "batch": torch.tensor(batch_idx)}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_may_return_a_dict_or_nothing_and_log_at_each_step() -> None:
    ours, lightnings = (Fit(own, Skips) for own in (True, False))
    assert ours.loop.plain
    assert_alike(ours, lightnings)


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("seen", float(batch_idx))
        trainer.should_stop = batch_idx == 3


def test_a_callback_may_log_and_stop_the_fit() -> None:
    ours, lightnings = (Fit(own, callback=Stops()) for own in (True, False))
    assert ours.loop.plain and ours.trainer.global_step == 4
    assert_alike(ours, lightnings)


def test_command_line_fits_by_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnist_lightning.cli import CLI

    monkeypatch.chdir(tmp_path)
    cli = CLI(["fit", "--data.source", "digits", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"])
    loop = cli.trainer.fit_loop.epoch_loop
    assert isinstance(loop, StepLoop) and loop.plain
