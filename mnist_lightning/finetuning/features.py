"""FeatureCache: what the frozen layers of ResNet18 make of each image is computed once, and the rest trains on that.

N = images, D = shape of one image's features: (512,) of a whole backbone. Features stay on disk under a name made from
all that determines them: weights, statistics, pixels, image size, precision. Where they would not be exact the cache
turns itself off, and one line says why.
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

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.files import load_safely, write_whole
from mnist_lightning.loader import Images
from mnist_lightning.resnet import Features, ResNet18

FORMAT = 2  # of the files; part of their names
SIZE_LIMIT = 2 * 2**30  # bytes of all files together; the longest unused are deleted
LARGEST = 2**30  # bytes of one data set's features: they have to fit into memory as well
PIXELS_A_BATCH = 2**20

Part = Literal["train", "val", "test"]


class FeatureCache(Callback):
    """While ResNet18 is fitted, and in the test that follows, the datamodule's batches hold features."""

    def __init__(self) -> None:
        self.layers = -1  # how many layers the cached features have passed; -1: nothing is decided yet
        self.used = False
        self._frozen: list[nn.Parameter] = []  # of those layers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.layers = -1
        self.on_train_epoch_start(trainer, pl_module)  # which a fit that is resumed in mid-epoch doesn't call

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.used and any(p.requires_grad for p in self._frozen) and isinstance(pl_module, ResNet18):
            got = f"layer {pl_module.frozen + 1} of the backbone unfrozen in mid-epoch, while features are cached"
            remedy = "give --model.cache_features false; in Python list FeatureCache after that callback."
            raise UserError("layers that are unfrozen between epochs", got, remedy)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = datamodule_of(trainer)
        # `test` of a checkpoint passes each image once anyway.
        if self.used and data is not None and isinstance(pl_module, ResNet18) and pl_module.frozen == self.layers:
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
        if not isinstance(pl_module, ResNet18) or pl_module.frozen == self.layers:
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

    def _replace(self, trainer: Trainer, model: ResNet18, data: MNISTDataModule, part: Part, images: Images) -> None:
        values = features(trainer, model, images.images)
        data.use_features(part, Features(values, model.frozen))


def datamodule_of(trainer: Trainer) -> MNISTDataModule | None:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule if isinstance(datamodule, MNISTDataModule) else None


def reason_against(model: ResNet18, data: MNISTDataModule | None) -> str:
    """Why features can't be cached, or "" if they can."""
    if not model.cache_features:
        return "--model.cache_features is false"
    if data is None:
        return "the images don't come from MNISTDataModule"
    if not all(isinstance(images, Images) for images in (data.train_set, data.val_set, data.test_set)):
        return "the images aren't in memory as Images"
    if data.augment:
        return "--data.augment changes the images at each step"
    if model.frozen == 0:
        return "no layer is frozen"
    if model.head.weight.dtype != torch.float32:
        return f"they would be in 32 bits, and the model is in {model.head.weight.dtype}"
    if any(module.training for layer in model.layers[: model.frozen] for module in layer.modules()):
        return "frozen layers are in training mode"
    size = 4 * len(data.train_set) * extract(model, data.train_set.images[:1]).numel()
    return f"they would take {size / 1e9:.1f} GB" if size > LARGEST else ""


def features(trainer: Trainer, model: ResNet18, images: Tensor) -> Tensor:
    """The frozen layers' output (N, *D) for uint8 images (N, 1, 28, 28): read from disk, or computed and kept there."""
    path = file_of(model, images, str(trainer.precision))
    values = read(path, len(images))
    if values is not None and path is not None:
        say(f"Features of {len(images):,} images read from {path.parent}.")
        return values
    with trainer.precision_plugin.forward_context():
        values = extract(model, images, show=trainer.is_global_zero).float().cpu()
    if trainer.is_global_zero:
        keep(path, values)
    return values


def extract(model: ResNet18, images: Tensor, show: bool = False) -> Tensor:
    """The same, computed; with a progress bar if `show` is set and the output is a terminal."""
    frozen = frozen_part(model)
    batches = images.split(max(1, PIXELS_A_BATCH // model.image_size**2))
    with torch.no_grad():
        bar = tqdm(batches, "Features", unit=" batches", disable=None if show else True)
        return torch.cat([frozen(model.prepare(batch.to(model.device))) for batch in bar])


def frozen_part(model: ResNet18) -> nn.Sequential:
    return nn.Sequential(*model.layers[: model.frozen])


def cache_folder() -> Path | None:
    """~/.cache/mnist_lightning, or where XDG_CACHE_HOME says; None for a user without a home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mnist_lightning"
    except RuntimeError:
        return None


def file_of(model: ResNet18, images: Tensor, precision: str) -> Path | None:
    """The file for these features: a change of a weight, pixel, image size, precision or format changes its name."""
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(f"{FORMAT} {model.frozen} {model.image_size} {precision} {tuple(images.shape)}".encode())
    for value in frozen_part(model).state_dict().values():
        digest.update(value.cpu().contiguous().numpy().data)
    digest.update(images.contiguous().numpy().data)
    return folder / f"{digest.hexdigest()[:32]}.features"


def read(path: Path | None, count: int) -> Tensor | None:
    """`count` rows of features from a file; None if it is missing or damaged."""
    if path is None or not path.is_file():
        return None
    try:
        values = load_safely(path, "features", "they are computed again.")
        if not (isinstance(values, Tensor) and values.dtype == torch.float32 and len(values) == count):
            raise UserError("features", f"{path}, which is something else", "they are computed again.")
        os.utime(path)  # now the last one to be deleted
    except (UserError, OSError) as error:
        say(" ".join(str(error).split()))
        return None
    return values


def keep(path: Path | None, values: Tensor) -> None:
    """Writes features, then deletes the longest unused files beyond SIZE_LIMIT. That may fail: it is only a cache."""
    if path is None:
        say("Features are not kept for the next run: there is no home directory; set XDG_CACHE_HOME.")
        return
    try:
        with write_whole(path) as file:
            torch.save(values, file)
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
