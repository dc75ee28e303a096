"""load_model(path).classify(picture): a checkpoint's answers from Python, its pictures read as `predict` reads them."""

import os
from functools import partial
from pathlib import Path
from typing import Any

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
    if saved.data_name:  # else nobody knows what its images are like
        model.classify_with(partial(classify, names=saved.names(model.num_classes), example=saved.example))
    return model


def classify(model: DigitClassifier, pictures: Any, names: list[str], example: Example) -> Any:
    """What `DigitClassifier.classify` returns, with what a checkpoint knows: the classes, and what an image is like."""
    if not isinstance(pictures, (list, tuple)):
        return classify(model, [pictures], names, example)[0]
    if not pictures:
        return []
    with no_doubts():
        images = torch.stack([as_image(picture, example) for picture in pictures])
    with evaluated(model):
        logits = torch.cat([model(batch.to(model.device)) for batch in images.split(64)])  # (N, C)
    found = logits.softmax(1).tolist()
    return [dict(sorted(zip(names, p, strict=True), key=lambda pair: -pair[1])) for p in found]


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
                return prepared(file, example)
        if isinstance(picture, np.ndarray):
            picture = from_array(picture)
        if not isinstance(picture, Image.Image):
            raise NoPicture("neither a path, nor a PIL image, nor an array")
        try:
            return prepared(picture.copy(), example)
        except Exception as error:  # a picture that is read only now may be damaged
            raise NoPicture(f"{error}") from error
    except NoPicture as reason:
        raise UserError("a picture", f"{name}: {reason}", "give another one.") from reason


def prepared(picture: Image.Image, example: Example) -> Tensor:
    """Uint8 (1, 28, 28), or (3, S, S). The picture is changed."""
    return torch.from_numpy(ink(picture).image)[None] if example == MNIST_EXAMPLE else square(picture, example.shape[1])


def from_array(pixels: np.ndarray) -> Image.Image:
    in_form = pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.dtype != np.uint8 or not in_form or not pixels.size:
        raise NoPicture(f"{pixels.dtype} {pixels.shape}, not uint8 (H, W) or (H, W, 3)")
    return Image.fromarray(pixels)
