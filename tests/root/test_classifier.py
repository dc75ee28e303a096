"""DigitClassifier in a plain Trainer: its metrics, its optimizer and schedule, and what a checkpoint knows of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.loader import Images

FIT = {"max_epochs": 2, "limit_train_batches": 3}


def digits(**settings: Any) -> MNISTDataModule:
    return MNISTDataModule(**{"source": "digits", "batch_size": 16, "train_size": 88, "val_size": 2000, **settings})


def named(scheduler: str, **arguments: Any) -> ConvNet:
    """ConvNet with a schedule that is given by its name, on Lightning's own command line."""
    chosen = {"class_path": f"torch.optim.lr_scheduler.{scheduler}", "init_args": arguments}
    args = {"seed_everything": 0, "model": {"scheduler": chosen}, "trainer": {"logger": False, "accelerator": "cpu"}}
    return LightningCLI(ConvNet, run=False, args=args, auto_configure_optimizers=False).model


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[Trainer], None]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def fail(trainer: Trainer) -> None:
    raise RuntimeError("stopped by a test")


# ---- Metrics


def standing_still(**arguments: Any) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(optimizer=lambda params: SGD(params, lr=0.0), **arguments)


def formula(model: ConvNet, part: Images, label_smoothing: float = 0.0) -> dict[str, Any]:
    with torch.no_grad():
        logits = model(part.images)
    loss = F.cross_entropy(logits, part.labels, label_smoothing=label_smoothing).item()
    accuracy = (logits.argmax(1) == part.labels).float().mean().item()
    return {"loss": pytest.approx(loss, rel=1e-5), "acc": pytest.approx(accuracy)}


def test_metrics_are_means_over_all_images_of_an_epoch(quiet: Callable) -> None:
    """The last batch is shorter in each part: 8 of 16 images, 110 of 250."""
    model, data = standing_still(label_smoothing=0.3), digits(val_size=0.25)
    trainer = quiet(max_epochs=1)
    trainer.fit(model, data)
    fitted = trainer.callback_metrics
    (tested,) = trainer.test(model, data, verbose=False)
    expected = {"train": formula(model, data.train_set, 0.3), "val": formula(model, data.val_set)}
    assert {part: {name: fitted[f"{part}/{name}"] for name in ("loss", "acc")} for part in expected} == expected
    assert {name: tested[f"test/{name}"] for name in ("loss", "acc")} == formula(model, data.test_set)


def test_training_accuracy_is_of_this_fit_where_an_earlier_one_was_cut_short(quiet: Callable) -> None:
    model, data = standing_still(), digits()
    with pytest.raises(RuntimeError, match="stopped by a test"):
        quiet(max_epochs=1, callbacks=At(2, fail)).fit(model, data)
    trainer = quiet(max_epochs=1)
    trainer.fit(model, data)
    assert trainer.callback_metrics["train/acc"] == formula(model, data.train_set)["acc"]


class OwnStep(ConvNet):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", 7.0)
        return loss


def test_training_step_of_ones_own_logs_for_itself(quiet: Callable) -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(OwnStep(), digits())
    assert trainer.callback_metrics["train/loss"] == 7 and "train/acc" not in trainer.callback_metrics


def test_loss_that_is_not_a_number_is_shown(quiet: Callable) -> None:
    model = ConvNet()
    model.fc2.bias.data[0] = torch.nan
    (tested,) = quiet(limit_test_batches=1).test(model, digits(), verbose=False)
    assert tested["test/loss"] != tested["test/loss"]


def test_predictions_are_probabilities_with_labels_where_the_batch_has_some(quiet: Callable) -> None:
    data = digits()
    model = ConvNet()
    answers = quiet().predict(model, data)
    assert torch.equal(torch.cat([answer["labels"] for answer in answers]), data.test_set.labels)
    probabilities = torch.cat([answer["probabilities"] for answer in answers])
    with torch.no_grad():
        torch.testing.assert_close(probabilities, model(data.test_set.images).softmax(1))
    (unlabelled,) = quiet().predict(model, DataLoader(data.test_set.images, batch_size=360))
    assert set(unlabelled) == {"probabilities"}


# ---- The optimizer and the schedule


def test_schedule_given_as_a_function_steps_after_each_epoch(quiet: Callable) -> None:
    model = ConvNet(optimizer=lambda params: Adam(params, lr=2e-3), scheduler=lambda adam: StepLR(adam, 1, gamma=0.5))
    trainer = quiet(**FIT)
    trainer.fit(model, digits())
    (optimizer,) = trainer.optimizers
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (Adam, 5e-4)


def test_reduce_on_plateau_watches_the_metric_that_it_is_told(quiet: Callable) -> None:
    schedule = {"monitor": "val/loss", "patience": 0, "factor": 0.5}
    model = ConvNet(
        optimizer=lambda params: SGD(params, lr=1e-12),  # the loss stays as it is
        scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, eps=0, **schedule),
    )
    trainer = quiet(max_epochs=3, limit_train_batches=1)
    trainer.fit(model, digits())
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.best == trainer.callback_metrics["val/loss"]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25e-12)


@pytest.mark.parametrize(("settings", "arguments", "steps", "total"), [
    ({}, {}, 6, 6),
    ({"accumulate_grad_batches": 2}, {}, 4, 4),  # the third batch of an epoch makes a step of its own
    ({"max_steps": 5}, {}, 5, 5),
    ({"max_steps": 50}, {}, 6, 6),  # the epochs end before
    ({"limit_train_batches": 0.5}, {}, 6, 6),  # of 6 batches
    ({"limit_train_batches": None}, {}, 12, 12),
    ({}, {"total_steps": 9}, 6, 9),
    ({}, {"epochs": 2, "steps_per_epoch": 4}, 6, 8),
])  # fmt: skip
def test_onecycle_steps_after_each_batch_to_the_end_of_the_fit(
    settings: dict[str, Any], arguments: dict[str, Any], steps: int, total: int, quiet: Callable
) -> None:
    trainer = quiet(**{**FIT, **settings})
    trainer.fit(named("OneCycleLR", max_lr=0.1, **arguments), digits())
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert (schedule.last_epoch, schedule.total_steps) == (steps, total)


def test_fit_resumed_in_mid_epoch_keeps_its_place_in_the_data_and_in_the_schedule(
    quiet: Callable, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = named("OneCycleLR", max_lr=0.1)
    saves = At(4, lambda trainer: trainer.save_checkpoint(tmp_path / "mid.ckpt"))
    quiet(**FIT, callbacks=saves).fit(whole, digits())
    resumed = named("OneCycleLR", max_lr=0.1)
    trainer = quiet(**FIT)
    trainer.fit(resumed, digits(), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == trainer.global_step == 6
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


# ---- Checkpoints


@pytest.fixture
def saved(quiet: Callable, tmp_path: Path) -> Callable[..., Path]:
    def save(model: ConvNet, **settings: Any) -> Path:
        trainer = quiet(max_epochs=1, limit_train_batches=1, **settings)
        trainer.fit(model, digits())
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return tmp_path / "saved.ckpt"

    return save


def test_checkpoint_holds_model_class_and_settings_as_plain_values(saved: Callable) -> None:
    path = saved(ConvNet(num_classes=26, label_smoothing=0.1))
    content = torch.load(path, weights_only=True)
    expected = {"num_classes": 26, "label_smoothing": 0.1}
    assert content["class_path"] == "mnist_lightning.convnet.ConvNet"
    assert {name: content["hyper_parameters"].get(name) for name in expected} == expected
    assert content["datamodule_hyper_parameters"]["batch_size"] == 16
    loaded = ConvNet.load_from_checkpoint(path, weights_only=True)
    assert (loaded.num_classes, loaded.fc2.out_features, loaded.label_smoothing) == (26, 26, 0.1)
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in loaded.state_dict().items())
    assert MNISTDataModule.load_from_checkpoint(path, weights_only=True).batch_size == 16


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_function_from_python_is_asked_for_again_when_its_model_is_trained_further(
    name: str, saved: Callable, quiet: Callable
) -> None:
    function = {"optimizer": lambda params: Adam(params), "scheduler": lambda optimizer: StepLR(optimizer, 1)}[name]
    path = saved(ConvNet(**{name: function}))
    with pytest.warns(UserWarning, match=f"The checkpoint's {name} was a Python function, .* pass {name}="):
        model = ConvNet.load_from_checkpoint(path, weights_only=True)
    quiet(limit_test_batches=1).test(model, digits(), verbose=False)
    with pytest.raises(UserError, match=rf"expected the {name} to train with\ngot .*\npass {name}= when you load"):
        quiet(**FIT).fit(model, digits())
    again = ConvNet.load_from_checkpoint(path, weights_only=True, **{name: function})
    quiet(max_epochs=2, limit_train_batches=1).fit(again, digits(), ckpt_path=path, weights_only=True)
    assert again.global_step == 2


def test_default_optimizer_and_one_by_name_come_back_with_the_checkpoint(saved: Callable, quiet: Callable) -> None:
    for model in (ConvNet(), named("StepLR", step_size=1)):
        again = ConvNet.load_from_checkpoint(saved(model), weights_only=True)
        quiet(**FIT).fit(again, digits())
        assert again.global_step == 6
