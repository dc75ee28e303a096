"""Runs that several tests look at: each gets a copy of its own."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from running import RUN, SHORT, Fit, fit
from torchvision.models import resnet18


@pytest.fixture(scope="session")
def convnet_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Two epochs of ConvNet on the digits, 42 steps, with pictures."""
    settings = ("--data.source", "digits", "--data.batch_size", 64, "--trainer.max_epochs", 2)
    return fit(tmp_path_factory.mktemp("convnet"), *settings, "--trainer.log_every_n_steps", 10)


@pytest.fixture(scope="session")
def resnet_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A fit of ResNet18 with its own number of epochs, with pictures. Its file of weights is gone afterwards."""
    weights = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), weights)
    settings = ("--model", "ResNet18", "--model.weights", weights, "--model.image_size", 28, *SHORT)
    drawn = ("--pictures", "true", "--trainer.log_every_n_steps", 1)
    fitted = fit(tmp_path_factory.mktemp("resnet"), *settings, *drawn)
    weights.unlink()
    return fitted


@pytest.fixture
def convnet(convnet_fit: Fit, folder: Path) -> Path:
    """The test's own copy of ConvNet's run; lightning_logs is in the current folder."""
    shutil.copytree(convnet_fit.root, folder, dirs_exist_ok=True)
    return RUN


@pytest.fixture
def resnet(resnet_fit: Fit, folder: Path) -> Path:
    shutil.copytree(resnet_fit.root, folder, dirs_exist_ok=True)
    return Path(os.path.dirname(RUN.parent), "ResNet18-digits", "version_0")
