"""Pictures of one's own handwriting, brought into MNIST's form for `predict`."""

from mnist_lightning.photos.datamodule import Photos

__all__ = ["Photos"]
