"""load_model(path).classify(picture): a checkpoint's answers from Python, its pictures read as `predict` reads them."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.errors import UserError
from mnist_lightning.photos.ink import ink
from mnist_lightning.photos.reading import NoPicture, no_doubts, opened, square
from mnist_lightning.pictures.figures import evaluated
from mnist_lightning.runs.saved import MNIST_EXAMPLE, Example, Saved


def load_model(path: str | os.PathLike[str]) -> DigitClassifier:
    """The model of a checkpoint, of the class and with the settings that it was trained with: on the CPU, in eval mode.
    Its `classify` answers for pictures.

    Raises:
        UserError: there is no such file, it isn't a checkpoint of a DigitClassifier, or its class has changed since.
    """
    saved = Saved(path)
    model = saved.model()
    model.classify_with(Classify(saved.names(model.num_classes), saved.example))
    return model


class Classify(NamedTuple):
    """What `DigitClassifier.classify` does, with what the checkpoint knows."""

    names: list[str]  # of the classes
    example: Example

    def __call__(self, model: DigitClassifier, pictures: Any) -> Any:
        several = isinstance(pictures, (list, tuple))
        if several and not pictures:
            return []
        with no_doubts():
            images = [as_image(picture, self.example) for picture in (pictures if several else [pictures])]
        with evaluated(model):
            logits = [model(batch.to(model.device)) for batch in torch.stack(images).split(64)]  # (B, C)
        probabilities = torch.cat(logits).softmax(1).tolist()
        found = [dict(sorted(zip(self.names, p, strict=True), key=lambda pair: -pair[1])) for p in probabilities]
        return found if several else found[0]


def as_image(picture: Any, example: Example) -> Tensor:
    """A picture as a model that was trained on such images takes it: a digit in MNIST's form, or a square in colour.

    Raises:
        UserError: it is no picture, shows no digit, or the model takes images of another kind.
    """
    if example != MNIST_EXAMPLE and not example.is_square_in_colour:
        remedy = "call the model itself with a tensor of such images."
        raise UserError("a model of digits as MNIST has them, or of pictures in colour", f"one of {example}", remedy)
    name = str(picture) if isinstance(picture, (str, os.PathLike)) else f"this {type(picture).__name__}"
    try:
        if isinstance(picture, (str, os.PathLike)):
            with opened(Path(picture).expanduser()) as file:
                return in_form(file, example)
        if isinstance(picture, np.ndarray):
            picture = from_array(picture)
        if not isinstance(picture, Image.Image):
            raise NoPicture("neither a path, nor a PIL image, nor an array")
        return in_form(picture.copy(), example)
    except NoPicture as reason:
        raise UserError("a picture", f"{name}: {reason}", "give another one.") from reason


def in_form(picture: Image.Image, example: Example) -> Tensor:
    """Uint8 (1, 28, 28), or (3, S, S). The picture is changed."""
    return torch.from_numpy(ink(picture).image)[None] if example == MNIST_EXAMPLE else square(picture, example.shape[1])


def from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3) or not pixels.size:
        raise NoPicture(f"{pixels.dtype} {pixels.shape}, not uint8 (H, W) or (H, W, 3)")
    return Image.fromarray(pixels)
