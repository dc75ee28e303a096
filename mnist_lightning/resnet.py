"""ResNet18: a pretrained backbone (He et al., arXiv:1512.03385), frozen as far as one likes, and a new head, 512 -> 10.

B = batch size, S = image_size. Optimizer by default: the tutorial's SGD on the head, lr 0.001, momentum 0.9.
"""

import pickle
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
import torch.nn.functional as F
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lightning.runs.checkpoints import load_safely
from mnist_lightning.classifier import NUM_CLASSES, DigitClassifier, LabelSmoothing
from mnist_lightning.errors import UserError
from mnist_lightning.finetuning.features import FeatureCache
from mnist_lightning.sources import network_timeout

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], red, green, blue: what the weights were trained with
STD = (0.229, 0.224, 0.225)

ImageSize = restricted_number_type("ImageSize", int, [(">=", 28), ("<=", 512)])
TrainableLayers = restricted_number_type("TrainableLayers", int, [(">=", 0), ("<=", 5)])
LearningRateFactor = restricted_number_type("LearningRateFactor", float, [(">", 0), ("<=", 1)])


class ResNet18(DigitClassifier):
    """torchvision's ResNet18 with a new last layer: by default that alone is trained, 5,130 of 11,181,642 parameters.

    Frozen means the parameters and the running statistics of BatchNorm, in every mode. The pretrained weights are
    fetched when a fresh fit starts, or by `load_pretrained()`; a checkpoint brings its own.

    Args:
        weights: where the backbone's weights come from: imagenet (torchvision's IMAGENET1K_V1), none (random: to see
            what pretraining is worth), or the path of a state dict in torchvision's names, or of a checkpoint of
            this project. The head is new in every case.
        image_size: pixels a side that the backbone sees, 28 to 512; cost grows with its square.
        trainable_layers: how much of the backbone is trained beside the head: 0 nothing, 1 layer4, 2 layer3 as well,
            3 layer2, 4 layer1, 5 all of it.
        backbone_lr_factor: the backbone's learning rate as a share of the head's, above 0 to 1.
        normalize_features: bring each of the 512 features to mean 0 and variance 1 before the head (BatchNorm without
            parameters).
        cache_features: pass each image through the frozen layers once, keep the result on disk, and train the rest on
            it: the same model, sooner.
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler. OneCycleLR and CyclicLR step after each batch, the others
            after each epoch; OneCycleLR's total_steps is filled in.
        label_smoothing: share of the training target that is spread over all ten digits, 0 to 1.
    """

    default_epochs = 5
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: str = "imagenet",
        image_size: ImageSize = 64,  # type: ignore[valid-type]
        trainable_layers: TrainableLayers = 0,  # type: ignore[valid-type]
        backbone_lr_factor: LearningRateFactor = 0.1,  # type: ignore[valid-type]
        normalize_features: bool = False,
        cache_features: bool = True,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.001, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,
    ) -> None:
        super().__init__(optimizer, scheduler, label_smoothing)
        from torchvision.models import resnet18

        self.weights, self.image_size, self.cache_features = weights, image_size, cache_features
        self.trainable_layers, self.backbone_lr_factor = trainable_layers, backbone_lr_factor
        self.backbone = net = resnet18()
        width = net.fc.in_features
        self.norm = nn.BatchNorm1d(width, affine=False) if normalize_features else nn.Identity()
        self.head = nn.Linear(width, NUM_CLASSES)
        net.fc = nn.Identity()
        # The backbone, cut where FeatureCache may cut it; a tuple, so that no module is registered twice.
        stem, pool = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool), nn.Sequential(net.avgpool, nn.Flatten())
        self.layers = (stem, net.layer1, net.layer2, net.layer3, net.layer4, pool)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # the same numbers, laid out as the CPU's convolutions want them
        self.train_layers(trainable_layers)
        self.feature_cache = FeatureCache()
        self._has_weights = False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_has_weights", True))

    def train_layers(self, layers: int) -> None:
        """Trains the last `layers` of the backbone's five from now on, and freezes those before."""
        self.frozen = len(self.layers) if layers == 0 else 5 - layers  # so many of self.layers
        self.backbone.requires_grad_(False)
        for layer in self.layers[self.frozen :]:
            layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet18":
        super().train(mode)
        self.backbone.eval()  # in training mode a frozen BatchNorm would go on to update its running statistics
        for layer in self.layers[self.frozen :]:
            layer.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of uint8 images (B, 1, 28, 28), or of what the frozen layers made of them, in floats."""
        x = images if images.is_floating_point() else self.frozen_features(images)
        for layer in self.layers[self.frozen :]:
            x = layer(x)
        return self.head(self.norm(x))

    def prepare(self, images: Tensor) -> Tensor:
        """What the backbone sees (B, 3, S, S) of uint8 images (B, 1, 28, 28).

        Raises:
            UserError: the backbone has no weights yet.
        """
        if not self._has_weights:
            raise UserError(
                "a backbone with its weights loaded",
                "a ResNet18 that was only just built",
                "call model.load_pretrained(), fit it, or load a checkpoint.",
            )
        x = images.to(self.head.weight.dtype) / 255
        x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        x = (x - self.mean) / self.std  # grey becomes three channels
        return x.contiguous(memory_format=torch.channels_last)

    def frozen_features(self, images: Tensor) -> Tensor:
        """What the frozen layers make (B, *D) of uint8 images (B, 1, 28, 28): a fixed function."""
        x = self.prepare(images)
        for layer in self.layers[: self.frozen]:
            x = layer(x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """The backbone's output (B, 512) of uint8 images (B, 1, 28, 28)."""
        return self.backbone(self.prepare(images))

    def stages(self) -> dict[str, nn.Module]:
        return dict(zip(("stem", "layer1", "layer2", "layer3", "layer4"), self.layers, strict=False))

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        head = [(list(self.head.parameters()), 1.0)]
        return head + ([(trained, self.backbone_lr_factor)] if trained else [])

    def configure_callbacks(self) -> list[Callback]:
        return [self.feature_cache]

    def load_pretrained(self) -> None:
        """Loads the backbone's weights, once; nothing happens after a checkpoint or an earlier call brought some.

        Raises:
            UserError: the weights can't be had, or aren't ResNet18's.
        """
        if self._has_weights:
            return
        if self.weights == "none":
            rank_zero_only(print)(
                "WARNING: --model.weights none: the frozen backbone's features are random.", flush=True
            )
        else:
            state = imagenet_weights() if self.weights == "imagenet" else read_weights(Path(self.weights))
            try:
                self.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
            except RuntimeError as error:
                raise UserError(
                    "a state dict of ResNet18 in torchvision's names",
                    f"{self.weights}: {str(error).splitlines()[1].strip()}",
                    "give --model.weights another file, imagenet or none.",
                ) from error
        self._has_weights = True


def imagenet_weights() -> dict[str, Any]:
    """torchvision's IMAGENET1K_V1 weights, downloaded once to torch.hub's folder."""
    from filelock import FileLock
    from torchvision.models import ResNet18_Weights

    url = ResNet18_Weights.IMAGENET1K_V1.url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".resnet18.lock"), network_timeout():  # of several processes one downloads
            return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the answer, too; Python 3.13 warns of one left open
        raise UserError(
            f"ResNet18's ImageNet weights at {folder / Path(url).name}, or a network to download them",
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__} ({url})",
            "put that file there; or give --model.weights PATH, or --model.weights none (random features).",
        ) from error


def read_weights(path: Path) -> dict[str, Any]:
    """A state dict in torchvision's names, from such a file or from a checkpoint of this project.

    Raises:
        UserError: there is no such file, or it is neither. Nothing in it is ever executed (weights_only=True).
    """
    remedy = "give --model.weights another file, imagenet or none."
    expected = "a file with ResNet18's weights, saved by torch.save or by this project"
    content = load_safely(path, f"{expected}, or imagenet, or none", remedy)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        state = content["state_dict"]
        prefix = "backbone."
        content = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not isinstance(content, dict) or "layer4.1.bn2.weight" not in content:
        raise UserError(expected, f"{path}, which holds something else", remedy)
    return content
