"""The loops that the project is measured against, written here from the Chinese tutorial, called the original.

`tutorial_*`: torchvision's dataset, one PIL image at a time, a plain loop over its batches. `tutorial_pictures` alone
does what PyTorch's transfer-learning tutorial does.
`bare_*`: a plain loop over the project's own in-memory batches and model: what Lightning may cost on top.
"""

import itertools
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, models, transforms

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import Images, MNISTDataModule, split


def tutorial_convnet(data_dir: str, steps: int | None = None) -> Iterator[tuple[float, float]]:
    """The original's first loop, an epoch (or `steps` batches) at a time.

    Yields:
        (seconds of training so far, test accuracy in %).
    """
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    yield from _tutorial(model, optimizer, normalise, data_dir, steps, None)


def tutorial_resnet18(data_dir: str, weights: str, image_size: int, images: int) -> Iterator[tuple[float, float]]:
    """The original's second loop, changed to take grey images, on the first `images` of each set: yields as above."""
    steps = [transforms.Grayscale(3), transforms.Resize(image_size), transforms.ToTensor()]
    model = models.resnet18()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.requires_grad_(False)
    model.fc = nn.Linear(model.fc.in_features, 10)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.001, momentum=0.9)
    normalise = transforms.Compose([*steps, transforms.Normalize((0.1307,), (0.3081,))])
    yield from _tutorial(model, optimizer, normalise, data_dir, None, images)


def _tutorial(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    transform: object,
    data_dir: str,
    steps: int | None,
    images: int | None,
) -> Iterator[tuple[float, float]]:
    train, test = (datasets.MNIST(data_dir, train=part, transform=transform, download=True) for part in (True, False))
    if images:
        train, test = (Subset(part, range(min(images, len(part)))) for part in (train, test))
    batches, test_batches = DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=64)
    seconds = 0.0
    while True:
        start = time.perf_counter()
        for step, (inputs, labels) in enumerate(batches):
            if step == steps:
                break
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            loss.item()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in test_batches)
        yield seconds, 100 * right / len(test)


def tutorial_pictures(path: str, weights: str, everything: bool) -> Iterator[tuple[float, float]]:
    """ResNet18 on path/train/CLASS/*.jpg, tested on path/val, an epoch at a time: its head, or everything.

    Batches of 4, SGD, the learning rate 0.001 and a tenth of it after each 7 epochs, BatchNorm in training mode.

    Yields:
        (seconds of training so far, test accuracy in %).
    """
    tensors = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    varied = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *tensors])
    middle = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *tensors])
    train, test = datasets.ImageFolder(f"{path}/train", varied), datasets.ImageFolder(f"{path}/val", middle)
    batches, test_batches = DataLoader(train, 4, shuffle=True, num_workers=2), DataLoader(test, 4, num_workers=2)
    model = models.resnet18()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.requires_grad_(everything)
    model.fc = nn.Linear(model.fc.in_features, len(train.classes))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7)
    seconds = 0.0
    while True:
        start = time.perf_counter()
        model.train()
        for inputs, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in test_batches)
        yield seconds, 100 * right / len(test)


def bare_convnet(data_dir: str, steps: int | None = None) -> Iterator[float]:
    """A plain loop over the same batches and model, an epoch (or `steps` batches) and its validation at a time.

    Yields:
        seconds of each.
    """
    data = MNISTDataModule(source="mnist", data_dir=data_dir)
    data.setup("fit")
    while True:
        model = ConvNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        start = time.perf_counter()
        _bare_epoch(model, optimizer, data, steps)
        yield time.perf_counter() - start


def _bare_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: MNISTDataModule, steps: int | None) -> None:
    for images, labels in itertools.islice(data.train_dataloader(), steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.val_dataloader())


def bare_head(images: int, epochs: int) -> Iterator[float]:
    """A plain loop that trains a linear head on so many features (random numbers) in memory; reads and saves nothing.

    Yields:
        seconds of that many epochs and their validations.
    """
    features, labels = torch.randn(images, 512), torch.randint(10, (images,))
    chosen, kept = split(images, 1 / 12, 0)
    data = MNISTDataModule(batch_size=64)
    data.seed = 0
    data.train_set, data.val_set = Images(features[chosen], labels[chosen]), Images(features[kept], labels[kept])
    while True:
        head = nn.Linear(512, 10)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)
        start = time.perf_counter()
        for _ in range(epochs):
            _bare_epoch(head, optimizer, data, None)
        yield time.perf_counter() - start
