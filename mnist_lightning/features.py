"""FeatureCache: a frozen backbone is a fixed function, so each image passes it once and the head trains on the result.

N = images, D = 512 features. Exact or off: an unfrozen layer or data that isn't in memory turns it off, and one line
says so. Features stay on disk under a name made from all that determines them; a file that isn't whole is made again.
"""

import copy
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.files import write_whole
from mnist_lightning.sources import Split

if TYPE_CHECKING:
    from mnist_lightning.resnet import ResNet18

LAYOUT = 1  # of the files; part of their names
SIZE_BOUND = 2 * 2**30  # bytes of all files together; the longest unused go first
DIGEST = hashlib.sha256().digest_size
PIXELS_A_PASS = 2**20  # of a batch: measured best at image sizes 28 to 224, see docs/results.md


def cache_folder() -> Path:
    """~/.cache/mnist_lightning, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mnist_lightning"


class FeatureCache(Callback):
    """While a fit and its final test run, the datamodule's batches hold features (B, D) instead of images."""

    def __init__(self) -> None:
        self.used = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: ResNet18 = pl_module  # type: ignore[assignment]
        data = trainer.datamodule  # type: ignore[attr-defined]
        model.load_pretrained()
        reason = self._reason_against(model, data)
        self.used = not reason
        if reason:
            say(f"Features of the frozen backbone are not kept: {reason}.")
        else:
            data.features = data.digits._replace(train=self._features(trainer, model, data.digits.train))

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

    def _reason_against(self, model: "ResNet18", data: object) -> str:
        if not model.cache_features:
            return "--model.cache_features is false"
        if not isinstance(data, MNISTDataModule):
            return "the images don't come from MNISTDataModule"
        if any(parameter.requires_grad for parameter in model.backbone.parameters()):
            return "some of its layers are trained"
        return ""

    def _features(self, trainer: Trainer, model: "ResNet18", part: Split) -> Split:
        path = cache_folder() / f"{_name(model, part.images, str(trainer.precision))}.features"
        features = read(path, len(part.labels))
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
        """Features (N, D): each process computes its share, and all get the whole."""
        share = -(-len(images) // trainer.world_size)
        mine = images[share * trainer.global_rank :][:share]
        out = torch.zeros(share, model.head.in_features, device=model.device)
        with trainer.strategy.precision_plugin.forward_context():
            out[: len(mine)] = extract(model, mine, show=trainer.is_global_zero)
        return trainer.strategy.all_gather(out).reshape(-1, out.shape[1])[: len(images)].float().cpu()


def extract(model: "ResNet18", images: Tensor, show: bool = False) -> Tensor:
    """The backbone's features (N, D) of uint8 images (N, 1, 28, 28), as fast as the hardware gives them.

    Args:
        show: a progress bar, where the output is a terminal.
    """
    folded = copy.copy(model)  # the same module, but for a backbone whose BatchNorm is folded into its convolutions
    folded._modules = {**model._modules, "backbone": fuse(copy.deepcopy(model.backbone))}
    folded.to(memory_format=torch.channels_last)
    batch = max(1, PIXELS_A_PASS // model.image_size**2)
    out = []
    with (
        torch.inference_mode(),
        tqdm(total=len(images), desc="Features", unit=" images", disable=None if show else True) as bar,
    ):
        for chunk in images.split(batch):
            out.append(folded.features(chunk.to(model.device)))
            bar.update(len(chunk))
    return torch.cat(out)


def read(path: Path, count: int) -> Tensor | None:
    """Features (`count`, D) from a file, or None where it isn't there whole: missing, truncated, a bit flipped."""
    try:
        content = bytearray(path.read_bytes())
        os.utime(path)  # used now: not the next to go
    except OSError:
        return None
    body = memoryview(content)[DIGEST:]
    if hashlib.sha256(body).digest() != content[:DIGEST]:
        say(f"{path} is damaged; its features are computed again.")
        return None
    return torch.frombuffer(content, dtype=torch.float32, offset=DIGEST).view(count, -1)


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
    digest = hashlib.sha256(f"{LAYOUT} {model.image_size} {precision} {tuple(images.shape)}".encode())
    for value in model.backbone.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().data)
    digest.update(images.contiguous().numpy().data)
    return digest.hexdigest()[:32]


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)


def _megabytes(path: Path) -> int:
    return round(path.stat().st_size / 1e6)
