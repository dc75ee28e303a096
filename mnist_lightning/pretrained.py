"""PretrainedClassifier: a pretrained backbone, frozen as far as one likes, and a new head, whatever the network.

B = batch size, C = channels, H, W = height and width, S = image_size, all in pixels; D = width of the features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lightning.classifier import DigitClassifier, LabelSmoothing, wrong_images
from mnist_lightning.errors import UserError
from mnist_lightning.files import load_safely

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], red, green, blue: what the weights were trained with
STD = (0.229, 0.224, 0.225)

ImageSize = restricted_number_type("ImageSize", int, [(">=", 28), ("<=", 512)])
LearningRateFactor = restricted_number_type("LearningRateFactor", float, [(">", 0), ("<=", 1)])


@dataclass
class Features:
    """What a model's first layers made of images, given to it in their place; see finetuning/features.py."""

    values: Tensor  # float (B, ...)
    layers: int  # how many layers the images have passed

    def __getitem__(self, index: int | list[int]) -> "Features":
        return Features(self.values[index], self.layers)


class Standardised(nn.BatchNorm1d):
    """BatchNorm1d for features (B, D). One that is alone in its batch, as the last of an epoch may be, has no variance:
    it is standardised by the running statistics."""

    def forward(self, features: Tensor) -> Tensor:
        if self.training and len(features) == 1:
            return F.batch_norm(features, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(features)


class PretrainedClassifier(DigitClassifier):
    """Base of the pretrained models: a subclass says how wide its features are, and defines `build`, `layers` and
    `imagenet`; where other weights ask for other pixels, `prepare`, too.

    Frozen layers keep their parameters and their BatchNorm statistics, in training mode, too. The pretrained weights
    are loaded when a fresh fit starts, or by `load_pretrained()`; a checkpoint brings its own.

    Args:
        weights: where the backbone's weights come from: imagenet, none (random: to see what pretraining is worth), or
            the path of a state dict in torchvision's names, or of a checkpoint of this project.
        image_size: pixels a side that the backbone sees, 28 to 512; by default 64 for images of 28×28, else as they
            come. Cost grows with its square.
        trainable_layers: how many of the backbone's layers, from the last on, are trained beside the head.
        backbone_lr_factor: the backbone's learning rate as a share of the head's, above 0 to 1.
        normalize_features: standardise each of the features (BatchNorm without parameters) before the head.
        cache_features: compute what the frozen layers make of each image once, keep it on disk, and train the rest on
            it: the same model, sooner.
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler. OneCycleLR and CyclicLR step after each batch, the others
            after each epoch; OneCycleLR's total_steps is filled in.
        label_smoothing: share of the training target that is spread over all classes, 0 to 1.
        num_classes: how many classes there are; by default as many as the data names, else 10.
    """

    default_epochs = 5
    width: int  # D

    def __init__(
        self,
        weights: str = "imagenet",
        image_size: ImageSize | None = None,  # type: ignore[valid-type]
        trainable_layers: NonNegativeInt = 0,
        backbone_lr_factor: LearningRateFactor = 0.1,  # type: ignore[valid-type]
        normalize_features: bool = False,
        cache_features: bool = True,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.001, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,
        num_classes: PositiveInt | None = None,
    ) -> None:
        weights = str(weights)  # a checkpoint holds no Path
        super().__init__(optimizer, scheduler, label_smoothing, num_classes)
        self.weights, self.image_size, self.cache_features = weights, image_size, cache_features
        self.trainable_layers, self.backbone_lr_factor = trainable_layers, backbone_lr_factor
        self.has_weights = False
        self.backbone: Any = self.build()  # whose layers have names of their own
        self.norm = Standardised(self.width, affine=False) if normalize_features else nn.Identity()
        self.head = nn.Linear(self.width, self.num_classes)
        self.to(memory_format=torch.channels_last)  # faster on CPUs; the values are the same
        self.train_layers(trainable_layers)

    def build(self) -> nn.Module:
        """The backbone with random weights; what it had for a head is nn.Identity."""
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """The backbone in order, from the prepared images to the features (B, D)."""
        raise NotImplementedError

    def imagenet(self) -> Mapping[str, Any]:
        """The state dict of --model.weights imagenet, in torchvision's names; downloaded if need be."""
        raise NotImplementedError

    def forward(self, images: Tensor | Features) -> Tensor:
        """Logits (B, num_classes) of uint8 images (B, 1 or 3, H, W), or of what the frozen layers made of them."""
        features = images if isinstance(images, Features) else Features(self.prepare(images), layers=0)
        x = features.values
        for layer in self.layers[features.layers :]:
            x = layer(x)
        return self.head(self.norm(x))

    def prepare(self, images: Tensor) -> Tensor:
        """What the backbone sees (B, 3, S, S) of uint8 images (B, 1 or 3, H, W).

        Raises:
            UserError: the images are of another kind, or the backbone has no weights yet.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise wrong_images("uint8 images (B, 1 or 3, H, W), 0 to 255", images)
        if min(images.shape[2:]) < 28:
            got = "{}×{}".format(*images.shape[2:])
            raise UserError("images of 28 pixels a side and more", got, "enlarge them, as by --data.size 28 and more.")
        if not self.has_weights:
            remedy = "call model.load_pretrained(), fit it, or load a checkpoint."
            raise UserError("a backbone with its weights loaded", f"a {type(self).__name__} only just built", remedy)
        x = images.to(self.head.weight.dtype) / 255
        size = self.image_size or (64 if images.shape[2:] == (28, 28) else None)
        if size is not None:
            x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        mean, std = x.new_tensor(MEAN).view(3, 1, 1), x.new_tensor(STD).view(3, 1, 1)
        x = (x - mean) / std  # one grey channel becomes three
        return x.contiguous(memory_format=torch.channels_last)

    @property
    def frozen(self) -> int:
        """How many of `layers`, from the first on, have nothing to train."""
        for count, layer in enumerate(self.layers):
            if any(parameter.requires_grad for parameter in layer.parameters()):
                return count
        return len(self.layers)

    def train_layers(self, count: int) -> None:
        """Trains the last `count` of the backbone's layers from now on, and freezes those before.

        Raises:
            UserError: it has fewer.
        """
        layers = [layer for layer in self.layers if list(layer.parameters())]  # pooling has none
        if not 0 <= count <= len(layers):
            raise UserError(f"trainable_layers from 0 to {len(layers)}", str(count), "give fewer.")
        self.backbone.requires_grad_(False)
        for layer in layers[len(layers) - count :]:
            layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PretrainedClassifier":
        super().train(mode)
        for layer in self.layers[: self.frozen]:
            layer.eval()  # in training mode a frozen BatchNorm would go on to update its running statistics
        return self

    def on_fit_start(self) -> None:
        self.load_pretrained()

    def load_pretrained(self) -> None:
        """Loads the backbone's weights, once; does nothing after a checkpoint or an earlier call brought some.

        Raises:
            UserError: the weights can't be had, or are another network's.
        """
        if self.has_weights:
            return
        if self.weights == "none":
            rank_zero_only(print)("WARNING: --model.weights none: the backbone's weights are random.", flush=True)
        else:
            expected = f"{type(self).__name__}'s weights in torchvision's names, or a checkpoint of this project"
            remedy = "give --model.weights another file, imagenet or none."
            use_imagenet = self.weights == "imagenet"
            try:
                content = self.imagenet() if use_imagenet else load_safely(Path(self.weights), expected, remedy)
                state = content.get("state_dict", content)  # a checkpoint holds one, torchvision's file is one
                ours = {name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")}
                gone = [name for name, layer in self.backbone.named_children() if isinstance(layer, nn.Identity)]
                theirs = {name: state[name] for name in state if name.partition(".")[0] not in gone}
                self.backbone.load_state_dict(ours or theirs)
            except (AttributeError, TypeError, RuntimeError, OSError) as error:  # OSError: of a download
                raise UserError(expected, f"{self.weights}: {' '.join(str(error).split())[:200]}", remedy) from error
        self.has_weights = True

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.has_weights = self.has_weights or any(name.startswith("backbone.") for name in state_dict)
        return result

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        head = [(list(self.head.parameters()), 1.0)]
        return head + ([(trained, self.backbone_lr_factor)] if trained else [])
