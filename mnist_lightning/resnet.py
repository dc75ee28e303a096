"""ResNet18: a pretrained backbone (He et al., arXiv:1512.03385), frozen as far as one likes, and a new head.

B = batch size, S = image_size. By default it is trained as in the tutorial: SGD on the head, learning rate 0.001,
momentum 0.9.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lightning.classifier import DigitClassifier, LabelSmoothing, check_images
from mnist_lightning.errors import UserError
from mnist_lightning.files import load_safely
from mnist_lightning.sources import imagenet_weights

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], red, green, blue: what the weights were trained with
STD = (0.229, 0.224, 0.225)

ImageSize = restricted_number_type("ImageSize", int, [(">=", 28), ("<=", 512)])
TrainableLayers = restricted_number_type("TrainableLayers", int, [(">=", 0), ("<=", 5)])
LearningRateFactor = restricted_number_type("LearningRateFactor", float, [(">", 0), ("<=", 1)])


@dataclass
class Features:
    """The output of a model's frozen layers, given to it in the place of images; see finetuning/features.py."""

    values: Tensor  # float (B, *D)
    layers: int  # how many layers the images have passed

    def __getitem__(self, index: int | list[int]) -> "Features":
        return Features(self.values[index], self.layers)


class ResNet18(DigitClassifier):
    """torchvision's ResNet18 with a new last layer: by default that alone is trained, 5,130 of 11,181,642 parameters.

    Frozen layers keep their parameters and their BatchNorm statistics, in training mode, too. The pretrained weights
    are loaded when a fresh fit starts, or by `load_pretrained()`; a checkpoint brings its own.

    Args:
        weights: where the backbone's weights come from: imagenet (torchvision's IMAGENET1K_V1), none (random: to see
            what pretraining is worth), or the path of a state dict in torchvision's names, or of a checkpoint of
            this project. The head is new in every case.
        image_size: pixels a side that the backbone sees, 28 to 512; cost grows with its square.
        trainable_layers: how much of the backbone is trained beside the head: 0 nothing, 1 layer4, 2 layer3 as well,
            3 layer2, 4 layer1, 5 all of it.
        backbone_lr_factor: the backbone's learning rate as a share of the head's, above 0 to 1.
        normalize_features: standardise each of the 512 features (BatchNorm without parameters) before the head.
        cache_features: compute what the frozen layers make of each image once, keep it on disk, and train the rest on
            it: the same model, sooner.
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler. OneCycleLR and CyclicLR step after each batch, the others
            after each epoch; OneCycleLR's total_steps is filled in.
        label_smoothing: share of the training target that is spread over all classes, 0 to 1.
        num_classes: how many classes there are.
    """

    default_epochs = 5

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
        num_classes: PositiveInt = 10,
    ) -> None:
        super().__init__(optimizer, scheduler, label_smoothing, num_classes)
        from torchvision.models import resnet18

        self.weights, self.image_size, self.cache_features = str(weights), image_size, cache_features
        self.trainable_layers, self.backbone_lr_factor = trainable_layers, backbone_lr_factor
        self.has_weights = False
        self.backbone = net = resnet18()
        width = net.fc.in_features  # 512
        net.avgpool, net.fc = nn.Sequential(net.avgpool, nn.Flatten()), nn.Identity()
        self.norm = nn.BatchNorm1d(width, affine=False) if normalize_features else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        self.to(memory_format=torch.channels_last)  # faster on CPUs; the values are the same
        self.train_layers(trainable_layers)

    def forward(self, images: Tensor | Features) -> Tensor:
        """Logits (B, num_classes) of uint8 images (B, 1, 28, 28), or of what the frozen layers made of them."""
        features = images if isinstance(images, Features) else Features(self.prepare(images), layers=0)
        x = features.values
        for layer in self.layers[features.layers :]:
            x = layer(x)
        return self.head(self.norm(x))

    def prepare(self, images: Tensor) -> Tensor:
        """What the backbone sees (B, 3, S, S) of uint8 images (B, 1, 28, 28).

        Raises:
            UserError: the images are of another kind, or the backbone has no weights yet.
        """
        check_images(images)
        if not self.has_weights:
            remedy = "call model.load_pretrained(), fit it, or load a checkpoint."
            raise UserError("a backbone with its weights loaded", "a ResNet18 that was only just built", remedy)
        x = images.to(self.head.weight.dtype) / 255
        x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        mean, std = x.new_tensor(MEAN).view(3, 1, 1), x.new_tensor(STD).view(3, 1, 1)
        x = (x - mean) / std  # one grey channel becomes three
        return x.contiguous(memory_format=torch.channels_last)

    @property
    def layers(self) -> list[nn.Module]:
        """The backbone in order: the stem, layer1 to layer4, the pooling. A module that was replaced counts."""
        net = self.backbone
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        stem.training = net.bn1.training  # the new Sequential would be in training mode
        return [stem, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool]

    @property
    def frozen(self) -> int:
        """How many of `layers`, from the first on, have nothing to train."""
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        return [*trained, True].index(True)

    def train_layers(self, count: int) -> None:
        """Trains the last `count` of the backbone's five layers from now on, and freezes those before."""
        self.backbone.requires_grad_(False)
        for layer in self.layers[5 - count : 5]:
            layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet18":
        super().train(mode)
        for layer in self.layers[: self.frozen]:
            layer.eval()  # in training mode a frozen BatchNorm would go on to update its running statistics
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.load_pretrained()

    def load_pretrained(self) -> None:
        """Loads the backbone's weights, once; does nothing after a checkpoint or an earlier call brought some.

        Raises:
            UserError: the weights can't be had, or aren't ResNet18's.
        """
        if self.has_weights:
            return
        if self.weights == "none":
            rank_zero_only(print)("WARNING: --model.weights none: the backbone's weights are random.", flush=True)
        else:
            path = imagenet_weights() if self.weights == "imagenet" else Path(self.weights)
            expected = "ResNet18's weights in torchvision's names, or a checkpoint of this project"
            remedy = "give --model.weights another file, imagenet or none."
            content = load_safely(path, expected, remedy)
            try:
                state = content.get("state_dict", content)  # a checkpoint holds one, torchvision's file is one
                ours = {name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")}
                self.backbone.load_state_dict(ours or {name: state[name] for name in state if name[:3] != "fc."})
            except (AttributeError, TypeError, RuntimeError) as error:
                raise UserError(expected, f"{path}: {' '.join(str(error).split())[:200]}", remedy) from error
        self.has_weights = True

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.has_weights = self.has_weights or any(name.startswith("backbone.") for name in state_dict)
        return result

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        head = [(list(self.head.parameters()), 1.0)]
        return head + ([(trained, self.backbone_lr_factor)] if trained else [])
