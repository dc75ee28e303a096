"""ConvNet: the tutorial's network from scratch: two convolutions, two fully connected layers, 421,642 parameters.

B = batch size; shapes after each change in comments. Optimizer by default: the tutorial's SGD, lr 0.01, momentum 0.9.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from mnist_lightning.classifier import NUM_CLASSES, DigitClassifier, LabelSmoothing

MEAN = 0.1307  # of MNIST's 60,000 training images, pixels in [0, 1]
STD = 0.3081

# Measured on processors with AVX only: on others oneDNN may have no fast code for its own layout.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class ConvNet(DigitClassifier):
    """The tutorial's ConvNet. Its layers carry the tutorial's names: a state dict saved by its loop loads here.

    Args:
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler. OneCycleLR and CyclicLR step after each batch, the others
            after each epoch; OneCycleLR's total_steps is filled in.
        label_smoothing: share of the training target that is spread over all ten digits, 0 to 1.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.01, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,
    ) -> None:
        super().__init__(optimizer, scheduler, label_smoothing)
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, NUM_CLASSES)
        self.to(memory_format=torch.channels_last)  # the same numbers, laid out as the CPU's convolutions want them

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of uint8 images (B, 1, 28, 28)."""
        x = (images.to(self.conv1.weight.dtype) / 255 - MEAN) / STD
        # A CPU is a tenth to a quarter faster in oneDNN's own layout, mostly by its pooling; the stride must be said.
        if onednn := (self.training or torch.is_inference_mode_enabled()) and takes_onednn(x) and self._finite():
            x = x.to_mkldnn()
        # Pool before ReLU: max and ReLU commute, and ReLU then sees a quarter of the values.
        x = F.relu(F.max_pool2d(self.conv1(x), 2, 2))  # (B, 32, 14, 14)
        x = F.relu(F.max_pool2d(self.conv2(x), 2, 2))  # (B, 64, 7, 7)
        if onednn:
            x = x.to_dense()
        x = F.relu(self.fc1(x.flatten(1)))  # (B, 128)
        return self.fc2(x)  # (B, 10)

    def _finite(self) -> bool:
        """Whether the convolutions' weights are: oneDNN's pooling drops a NaN, which has to be seen in the loss."""
        weights: tuple[Any, ...] = (self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias)
        return all(math.isfinite(weight.detach().sum().item()) for weight in weights)


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN's own layout exists for such a tensor here, and pays."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return ONEDNN and plain and not torch.compiler.is_compiling()
