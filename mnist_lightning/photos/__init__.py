"""What comes from a person's disk: pictures of one's own handwriting, and pictures by class."""

from mnist_lightning.photos.datamodule import Photos
from mnist_lightning.photos.image_folder import ImageFolder

__all__ = ["ImageFolder", "Photos"]
