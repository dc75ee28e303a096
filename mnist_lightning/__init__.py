"""The MNIST tutorial done for real with PyTorch Lightning: a ConvNet from scratch, a fine-tuned ResNet18."""

__version__ = "0.1.0"
