"""FeatureCache: frozen layers are a fixed function, so each image passes them once and the rest trains on the result.

N = images, D = what the frozen layers make of an image: (512,) of a whole backbone. Exact or off: augmentation, or data
that isn't in memory, turns it off, and one line says so. Features stay on disk under a name made from all that
determines them; a file that isn't whole is made again.
"""

import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse, optimize_for_inference
from tqdm import tqdm

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.files import write_whole
from mnist_lightning.sources import Split

if TYPE_CHECKING:
    from mnist_lightning.resnet import ResNet18

LAYOUT = 1  # of the files; part of their names
SIZE_BOUND = 2 * 2**30  # bytes of all files together; the longest unused go first
LARGEST = 2**30  # bytes of one data set's features: they have to fit in memory, too
DIGEST = hashlib.sha256().digest_size
PIXELS_A_PASS = 2**20  # of a batch: measured best at image sizes 28 to 224, see docs/results.md


def cache_folder() -> Path:
    """~/.cache/mnist_lightning, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mnist_lightning"


class FeatureCache(Callback):
    """While a fit and its final test run, the datamodule's batches hold features (B, *D) instead of images."""

    def __init__(self) -> None:
        self.used = False
        self.frozen = -1  # layers that the kept features have passed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.frozen = -1
        pl_module.load_pretrained()  # type: ignore[operator]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_up(trainer, pl_module)  # a fit resumed in mid-epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_up(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.used:  # the final test of a fit; `test` of a checkpoint passes each image once anyway
            model: ResNet18 = pl_module  # type: ignore[assignment]
            data = trainer.datamodule  # type: ignore[attr-defined]
            data.features = data.digits._replace(test=self._features(trainer, model, data.digits.test))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.used:
            trainer.datamodule.features = None  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def _keep_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Features of the layers that are frozen now: GradualUnfreezing changes which."""
        model: ResNet18 = pl_module  # type: ignore[assignment]
        data = trainer.datamodule  # type: ignore[attr-defined]
        if model.frozen == self.frozen:
            return
        self.teardown(trainer, model, "")
        self.frozen = model.frozen
        reason = self._reason_against(model, data)
        self.used = not reason
        if reason:
            say(f"Features of the frozen layers are not kept: {reason}.")
        else:
            data.features = data.digits._replace(train=self._features(trainer, model, data.digits.train))

    def _reason_against(self, model: "ResNet18", data: object) -> str:
        if not model.cache_features:
            return "--model.cache_features is false"
        if not isinstance(data, MNISTDataModule):
            return "the images don't come from MNISTDataModule"
        if data.augment:
            return "--data.augment changes the images at each step"
        if model.frozen == 0:
            return "no layer is frozen"
        if any(parameter.requires_grad for layer in model.layers[: model.frozen] for parameter in layer.parameters()):
            return "some of them are trained"
        size = 4 * len(data.digits.train.labels) * _shape(model, data.digits.train.images).numel()
        return f"they would take {size / 1e9:.1f} GB" if size > LARGEST else ""

    def _features(self, trainer: Trainer, model: "ResNet18", part: Split) -> Split:
        path = cache_folder() / f"{_name(model, part.images, str(trainer.precision))}.features"
        features = read(path, len(part.labels))
        if features is not None:
            features = features.view(len(features), *_shape(model, part.images))
        if not trainer.strategy.reduce_boolean_decision(features is not None, all=True):
            features = self._compute(trainer, model, part.images)
            if trainer.is_global_zero:
                try:
                    write(path, features)
                    say(f"Features kept in {path.parent} ({_megabytes(path)} MB); delete that folder at any time.")
                except OSError as error:
                    say(f"Features are not kept for the next run: {error}.")
        else:
            say(f"Features of {len(part.labels):,} images read from {path.parent}.")
        assert features is not None
        return Split(features, part.labels)

    def _compute(self, trainer: Trainer, model: "ResNet18", images: Tensor) -> Tensor:
        """Features (N, *D): each process computes its share, and all get the whole."""
        share = -(-len(images) // trainer.world_size)
        mine = images[share * trainer.global_rank :][:share]
        with trainer.strategy.precision_plugin.forward_context():
            out = extract(model, mine, show=trainer.is_global_zero)
        missing = out.new_zeros(share - len(mine), *out.shape[1:])
        shares = trainer.strategy.all_gather(torch.cat([out, missing]))
        return shares.reshape(-1, *out.shape[1:])[: len(images)].float().cpu()


def extract(model: "ResNet18", images: Tensor, show: bool = False) -> Tensor:
    """What the frozen layers make (N, *D) of uint8 images (N, 1, 28, 28), as fast as the hardware gives it.

    Args:
        show: a progress bar, where the output is a terminal.
    """
    frozen = faster(nn.Sequential(*model.layers[: model.frozen]), model.device)
    batch = max(1, PIXELS_A_PASS // model.image_size**2)
    out = []
    with (
        torch.inference_mode(),
        tqdm(total=len(images), desc="Features", unit=" images", disable=None if show else True) as bar,
    ):
        for chunk in images.split(batch):
            out.append(frozen(model.prepare(chunk.to(model.device))))
            bar.update(len(chunk))
    return torch.cat(out)


def faster(layers: nn.Module, device: torch.device) -> nn.Module:
    """The same function as `layers` in evaluation mode: BatchNorm folded into convolutions; on a CPU in oneDNN's own
    layout from the first layer to the last, which is faster than channels_last.
    """
    # torch builds that on TorchScript's modules, which Python 3.14 no longer supports.
    onednn = torch.backends.mkldnn.is_available() and sys.version_info < (3, 14)
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or not onednn:
        return fuse(layers).to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*script_method.*is deprecated", FutureWarning)
        return optimize_for_inference(layers)


def read(path: Path, count: int) -> Tensor | None:
    """`count` rows of features from a file, or None where it isn't there whole: missing, truncated, a bit flipped."""
    try:
        content = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.readinto(content.numpy().data)
        os.utime(path)  # used now: not the next to go
    except OSError:
        return None
    digest, body = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(body.numpy().data).digest() != bytes(digest.tolist()):
        say(f"{path} is damaged; its features are computed again.")
        return None
    return body.view(torch.float32).view(count, -1)


def write(path: Path, features: Tensor) -> None:
    """Writes features with their SHA-256 in front, then deletes the longest unused files beyond SIZE_BOUND."""
    body = features.contiguous().numpy().data
    with write_whole(path) as file:
        file.write(hashlib.sha256(body).digest())
        file.write(body)
    files = sorted(path.parent.glob("*.features"), key=lambda other: other.stat().st_mtime, reverse=True)
    total = 0
    for other in files:
        total += other.stat().st_size
        if total > SIZE_BOUND and other != path:
            other.unlink(missing_ok=True)


def _name(model: "ResNet18", images: Tensor, precision: str) -> str:
    """A name that another weight, pixel, image size, precision or file layout changes."""
    digest = hashlib.sha256(f"{LAYOUT} {model.frozen} {model.image_size} {precision} {tuple(images.shape)}".encode())
    for value in nn.Sequential(*model.layers[: model.frozen]).state_dict().values():
        digest.update(value.cpu().contiguous().numpy().data)
    digest.update(images.contiguous().numpy().data)
    return digest.hexdigest()[:32]


def _shape(model: "ResNet18", images: Tensor) -> torch.Size:
    """D."""
    with torch.inference_mode():
        return model.frozen_features(images[:1].to(model.device)).shape[1:]


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)


def _megabytes(path: Path) -> int:
    return round(path.stat().st_size / 1e6)
