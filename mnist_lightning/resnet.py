"""ResNet18 (He et al., arXiv:1512.03385), pretrained on ImageNet, with a new head; how it is frozen: pretrained.py.

B = batch size. By default it is trained as in the tutorial: SGD on the head, learning rate 0.001, momentum 0.9.
"""

from collections.abc import Mapping
from typing import Any

from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import SGD

from mnist_lightning.classifier import LabelSmoothing
from mnist_lightning.files import load_safely
from mnist_lightning.pretrained import ImageSize, LearningRateFactor, PretrainedClassifier
from mnist_lightning.sources import imagenet_weights

TrainableLayers = restricted_number_type("TrainableLayers", int, [(">=", 0), ("<=", 5)])


class ResNet18(PretrainedClassifier):
    """torchvision's ResNet18 with a new last layer: by default that alone is trained, 5,130 of 11,181,642 parameters.

    Frozen layers keep their parameters and their BatchNorm statistics, in training mode, too. The pretrained weights
    are loaded when a fresh fit starts, or by `load_pretrained()`; a checkpoint brings its own.

    Args:
        weights: where the backbone's weights come from: imagenet (torchvision's IMAGENET1K_V1), none (random: to see
            what pretraining is worth), or the path of a state dict in torchvision's names, or of a checkpoint of
            this project. The head is new in every case.
        image_size: pixels a side that the backbone sees, 28 to 512; by default 64 for images of 28×28, else as they
            come. Cost grows with its square.
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
        num_classes: how many classes there are; by default as many as the data names, else 10.
    """

    width = 512

    def __init__(
        self,
        weights: str = "imagenet",
        image_size: ImageSize | None = None,
        trainable_layers: TrainableLayers = 0,  # type: ignore[valid-type]
        backbone_lr_factor: LearningRateFactor = 0.1,
        normalize_features: bool = False,
        cache_features: bool = True,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.001, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,
        num_classes: PositiveInt | None = None,
    ) -> None:
        weights = str(weights)  # a checkpoint holds no Path
        super().__init__(
            weights, image_size, trainable_layers, backbone_lr_factor, normalize_features, cache_features,
            optimizer, scheduler, label_smoothing, num_classes,
        )  # fmt: skip

    def build(self) -> nn.Module:
        from torchvision.models import resnet18

        net = resnet18()
        net.avgpool = nn.Sequential(net.avgpool, nn.Flatten())  # (B, 512, 1, 1) becomes (B, 512)
        net.fc = nn.Identity()  # ImageNet's 1,000 classes; the new head takes its place
        return net

    @property
    def layers(self) -> list[nn.Module]:
        """The stem, layer1 to layer4, the pooling. A module that was replaced counts."""
        net = self.backbone
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        return [stem, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool]

    def imagenet(self) -> Mapping[str, Any]:
        return load_safely(imagenet_weights(), "ResNet18's weights", "delete that file, or give --model.weights none.")
