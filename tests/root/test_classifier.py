"""DigitClassifier in a plain Trainer: its metrics, its optimizer, and what a checkpoint knows of them."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from running import At, rows
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.loader import Images

FIT = {"max_epochs": 2, "limit_train_batches": 3}


def digits(**settings: Any) -> MNISTDataModule:
    return MNISTDataModule(**{"source": "digits", "batch_size": 16, "train_size": 88, "val_size": 2000, **settings})


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
        quiet(max_epochs=1, callbacks=At(2, fail), enable_checkpointing=True).fit(model, data)
    trainer = quiet(max_epochs=1)
    trainer.fit(model, data)
    assert trainer.callback_metrics["train/acc"] == formula(model, data.train_set)["acc"]


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_means_of_an_epoch_that_was_resumed_in_its_middle_are_over_all_of_it(
    settings: dict[str, Any], quiet: Callable, tmp_path: Path
) -> None:
    """88 images in six batches, the last of 8."""
    data = digits()
    saves = At(2, lambda trainer: trainer.save_checkpoint(tmp_path / "mid.ckpt"))
    with pytest.raises(RuntimeError, match="stopped by a test"):
        stopped = quiet(max_epochs=1, callbacks=[saves, At(3, fail)], enable_checkpointing=True, **settings)
        stopped.fit(standing_still(), data)
    model = standing_still()
    trainer = quiet(max_epochs=1, **settings)
    trainer.fit(model, data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert {name: trainer.callback_metrics[f"train/{name}"] for name in ("loss", "acc")} == formula(
        model, data.train_set
    )


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_training_means_are_over_the_images_of_all_processes(resumed: bool, quiet: Callable, tmp_path: Path) -> None:
    data, model = digits(), standing_still()
    saves = At(2, lambda trainer: trainer.save_checkpoint(tmp_path / "mid.ckpt"))
    two = {"max_epochs": 1, "strategy": "ddp_fork", "devices": 2}
    trainer = quiet(**two, callbacks=saves, enable_checkpointing=True)
    trainer.fit(model, data)
    if resumed:
        trainer = quiet(**two)
        trainer.fit(model, data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    data.setup("fit")
    assert {name: trainer.callback_metrics[f"train/{name}"] for name in ("loss", "acc")} == formula(
        model, data.train_set
    )


@pytest.mark.parametrize(("settings", "steps"), [
    ({}, [2, 4, 6]), ({"accumulate_grad_batches": 2}, [2]), ({"log_every_n_steps": 0}, []),
])  # fmt: skip
def test_loss_of_a_step_is_logged_where_metrics_are_logged_anyway(
    settings: dict[str, Any], steps: list[int], quiet: Callable, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    quiet(**{"max_epochs": 1, "log_every_n_steps": 2, "logger": logger, **settings}).fit(standing_still(), digits())
    logged = rows(Path(logger.log_dir, "metrics.csv"))
    assert [int(row["step"]) + 1 for row in logged if row.get("train/loss_step")] == steps


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


@pytest.mark.parametrize("resuming", [True, False])
def test_model_that_goes_on_with_another_optimizer_says_so(resuming: bool, saved: Callable, quiet: Callable) -> None:
    path = saved(ConvNet(optimizer=lambda params: Adam(params)))
    given = {"ckpt_path": path, "weights_only": True} if resuming else {}
    again = ConvNet.load_from_checkpoint(path, weights_only=True, optimizer=lambda params: Adam(params))
    quiet(max_epochs=2, limit_train_batches=1).fit(again, digits(), **given)
    other = ConvNet() if resuming else ConvNet.load_from_checkpoint(path, weights_only=True)
    with pytest.warns(UserWarning, match="Trained with Adam so far, and from now on with SGD"):
        with suppress(KeyError):  # of SGD, which gets Adam's settings
            quiet(max_epochs=2, limit_train_batches=1).fit(other, digits(), **given)


def test_checkpoint_of_the_default_optimizer_is_trained_further(saved: Callable, quiet: Callable) -> None:
    again = ConvNet.load_from_checkpoint(saved(ConvNet()), weights_only=True)
    quiet(**FIT).fit(again, digits())
    assert again.global_step == 6
