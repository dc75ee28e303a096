"""ConvNet: the tutorial's network: two convolutions, two fully connected layers, 421,642 parameters.

B = batch size. By default it is trained as in the tutorial: SGD, learning rate 0.01, momentum 0.9.
"""

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lightning.classifier import DigitClassifier, LabelSmoothing, wrong_images

MEAN = 0.1307  # of MNIST's 60,000 training images, pixels in [0, 1]
STD = 0.3081


class ConvNet(DigitClassifier):
    """The tutorial's ConvNet. Its layers carry the tutorial's names: a state dict saved by its loop loads here.

    Args:
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler. OneCycleLR and CyclicLR step after each batch, the others
            after each epoch; OneCycleLR's total_steps is filled in.
        label_smoothing: share of the training target that is spread over all classes, 0 to 1.
        num_classes: how many classes there are; by default as many as the data names, else 10.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.01, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,
        num_classes: PositiveInt | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, label_smoothing, num_classes)
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, self.num_classes)
        self.relu = nn.ReLU()
        self.to(memory_format=torch.channels_last)  # faster on CPUs; the values are the same

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of uint8 images (B, 1, 28, 28)."""
        if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
            raise wrong_images("uint8 images (B, 1, 28, 28), 0 to 255", images)
        x = (images.to(self.fc2.weight.dtype) / 255 - MEAN) / STD
        x = self.relu(self.conv1(x))  # (B, 32, 28, 28)
        x = self.pool(x)  # (B, 32, 14, 14)
        x = self.relu(self.conv2(x))  # (B, 64, 14, 14)
        x = self.pool(x)  # (B, 64, 7, 7)
        x = x.flatten(1)  # (B, 3136)
        x = self.relu(self.fc1(x))  # (B, 128)
        return self.fc2(x)  # (B, num_classes)
