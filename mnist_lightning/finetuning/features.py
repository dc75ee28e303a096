"""FeatureCache: what a model's frozen layers make of each image is computed once, and the rest trains on that.

N = images, D = shape of one image's features: (512,) of ResNet18's whole backbone. Features stay on disk under a name
made from all that determines them: the model's class, weights, statistics, pixels, precision. Where they would not be
exact the cache turns itself off, and one line says why.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from mnist_lightning.errors import UserError
from mnist_lightning.files import load_safely, write_whole
from mnist_lightning.loader import Images, ImagesDataModule
from mnist_lightning.pretrained import Features, PretrainedClassifier

FORMAT = 3  # of the files; part of their names
SIZE_LIMIT = 2 * 2**30  # bytes of all files together; the longest unused are deleted
LARGEST = 2**30  # bytes of one data set's features: they have to fit into memory as well
PIXELS_A_BATCH = 2**20

Part = Literal["train", "val", "test"]


class FeatureCache(Callback):
    """While a pretrained model is fitted, and in the test that follows, the datamodule's batches hold features."""

    def __init__(self) -> None:
        self.layers = -1  # how many layers the cached features have passed; -1: nothing is decided yet
        self.used = False
        self._frozen: list[nn.Parameter] = []  # of those layers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.layers = -1
        self.on_train_epoch_start(trainer, pl_module)  # which a fit that is resumed in mid-epoch doesn't call

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.used and any(p.requires_grad for p in self._frozen) and isinstance(pl_module, PretrainedClassifier):
            got = f"layer {pl_module.frozen + 1} of the backbone unfrozen in mid-epoch, while features are cached"
            remedy = "give --model.cache_features false; in Python list FeatureCache after that callback."
            raise UserError("layers that are unfrozen between epochs", got, remedy)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = datamodule_of(trainer)
        if not self.used or data is None or not isinstance(pl_module, PretrainedClassifier):
            return  # `test` of a checkpoint passes each image once anyway
        if pl_module.frozen == self.layers:
            self._replace(trainer, pl_module, data, "test", data.test_set)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = datamodule_of(trainer)
        if self.used and data is not None:
            for part in ("train", "val", "test"):
                data.use_features(part, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Caches the features of the layers that are frozen now: GradualUnfreezing changes which."""
        data = datamodule_of(trainer)
        if not isinstance(pl_module, PretrainedClassifier) or pl_module.frozen == self.layers:
            return
        self.teardown(trainer, pl_module, "")
        self.layers = pl_module.frozen
        self._frozen = list(frozen_part(pl_module).parameters())
        reason = reason_against(pl_module, data)
        self.used = not reason
        if reason or data is None:
            say(f"Features of the frozen layers are not cached: {reason}.")
            return
        self._replace(trainer, pl_module, data, "train", data.train_set)
        if len(data.val_set):
            self._replace(trainer, pl_module, data, "val", data.val_set)

    def _replace(
        self, trainer: Trainer, model: PretrainedClassifier, data: ImagesDataModule, part: Part, images: Images
    ) -> None:
        values = features(trainer, model, images.images)
        data.use_features(part, Features(values, model.frozen))


def datamodule_of(trainer: Trainer) -> ImagesDataModule | None:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule if isinstance(datamodule, ImagesDataModule) else None


def reason_against(model: PretrainedClassifier, data: ImagesDataModule | None) -> str:
    """Why features can't be cached, or "" if they can."""
    if not model.cache_features:
        return "--model.cache_features is false"
    if data is None:
        return "the images don't come from an ImagesDataModule"
    parts = (data.train_set, data.val_set, data.test_set)
    if not all(isinstance(part, Images) and isinstance(part.images, Tensor) for part in parts):
        return "the images aren't in memory as Images"
    if data.augment:
        return "--data.augment changes the images at each step"
    if model.frozen == 0:
        return "no layer is frozen"
    if model.head.weight.dtype != torch.float32:
        return f"they would be in 32 bits, and the model is in {model.head.weight.dtype}"
    # A Sequential has no mode of its own: one that `layers` has only just made is in training mode.
    if any(module.training for module in frozen_part(model).modules() if not isinstance(module, nn.Sequential)):
        return "frozen layers are in training mode"
    if cache_folder() is None:
        return "there is no home directory to keep them in: set XDG_CACHE_HOME"
    size = 4 * len(data.train_set) * extract(model, data.train_set.images[:1]).numel()
    return f"they would take {size / 1e9:.1f} GB" if size > LARGEST else ""


def features(trainer: Trainer, model: PretrainedClassifier, images: Tensor) -> Tensor:
    """The frozen layers' output (N, *D) for uint8 images (N, C, H, W): read from disk, or computed and kept there."""
    path = file_of(model, images, str(trainer.precision))
    values = read(path, (len(images), *extract(model, images[:1]).shape[1:]))
    if values is not None:
        say(f"Features of {len(images):,} images read from {path.parent}.")
        return values
    with trainer.precision_plugin.forward_context():
        values = extract(model, images, show=trainer.is_global_zero).float().cpu()
    if trainer.is_global_zero:
        keep(path, values)
    return values


def extract(model: PretrainedClassifier, images: Tensor, show: bool = False) -> Tensor:
    """The same, computed; with a progress bar if `show` is set and the output is a terminal."""
    frozen = frozen_part(model)
    with torch.no_grad():
        pixels = model.prepare(images[:1].to(model.device))[0, 0].numel()
        batches = images.split(max(1, PIXELS_A_BATCH // pixels))
        bar = tqdm(batches, "Features", unit=" batches", disable=None if show else True)
        return torch.cat([frozen(model.prepare(batch.to(model.device))) for batch in bar])


def frozen_part(model: PretrainedClassifier) -> nn.Sequential:
    return nn.Sequential(*model.layers[: model.frozen])


def cache_folder() -> Path | None:
    """~/.cache/mnist_lightning, or where XDG_CACHE_HOME says; None for a user without a home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mnist_lightning"
    except RuntimeError:
        return None


def file_of(model: PretrainedClassifier, images: Tensor, precision: str) -> Path:
    """The file for these features: a change of the class, a weight, a pixel, what is made of the pixels, the precision
    or the format changes its name."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    digest = hashlib.sha256(f"{FORMAT} {name} {model.frozen} {precision} {tuple(images.shape)}".encode())
    with torch.no_grad():
        seen = model.prepare(images[:1].to(model.device))
    for value in (seen, images, *frozen_part(model).state_dict().values()):
        digest.update(value.cpu().contiguous().numpy().data)
    return Path(cache_folder() or ".") / f"{digest.hexdigest()[:32]}.features"


def read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Features of this shape from a file; None if it is missing, damaged or holds others."""
    if not path.is_file():
        return None
    expected, remedy = "features", "they are computed again."
    try:
        kept = load_safely(path, expected, remedy)
        values = kept.get("features") if isinstance(kept, dict) else None
        right = isinstance(values, Tensor) and values.dtype == torch.float32 and values.shape == shape
        if values is None or not right or kept.get("sha256") != checksum(values):
            raise UserError(expected, f"{path}, which is something else", remedy)
        os.utime(path)  # now the last one to be deleted
    except (UserError, OSError) as error:
        say(" ".join(str(error).split()))
        return None
    return values


def checksum(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def keep(path: Path, values: Tensor) -> None:
    """Writes features, then deletes the longest unused files beyond SIZE_LIMIT. That may fail: it is only a cache."""
    try:
        with write_whole(path) as file:
            torch.save({"features": values, "sha256": checksum(values)}, file)
        files = sorted(path.parent.glob("*.features"), key=lambda other: other.stat().st_mtime, reverse=True)
        total = 0
        for other in files:
            total += other.stat().st_size
            if total > SIZE_LIMIT and other != path:
                other.unlink(missing_ok=True)
        size = round(path.stat().st_size / 1e6)
        say(f"Features kept in {path.parent} ({size} MB); delete that folder at any time.")
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        say(f"Features are not kept for the next run: {str(error).splitlines()[0]}.")


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)
