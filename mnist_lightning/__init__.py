"""Image classification with PyTorch and Lightning: a ConvNet on MNIST, and a fine-tuned ResNet18."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lightning.classifier import DigitClassifier
    from mnist_lightning.convnet import ConvNet
    from mnist_lightning.data import MNISTDataModule
    from mnist_lightning.photos import ImageFolder, Photos
    from mnist_lightning.photos.classify import load_model
    from mnist_lightning.resnet import ResNet18

__version__ = "0.2.0"
__all__ = ["ConvNet", "DigitClassifier", "ImageFolder", "MNISTDataModule", "Photos", "ResNet18", "load_model"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: a misspelt command shouldn't wait for torch."""
    homes = {
        "ConvNet": "convnet",
        "DigitClassifier": "classifier",
        "ImageFolder": "photos",
        "MNISTDataModule": "data",
        "Photos": "photos",
        "ResNet18": "resnet",
        "load_model": "photos.classify",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
