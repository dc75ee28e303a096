"""ConvNet against the network and the loop that the tutorial published, in plain torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from mnist_lightning.convnet import ConvNet
from mnist_lightning.errors import UserError
from mnist_lightning.sources import load_digits

TOLERANCE = 1e-5  # float32; the same sums in another order


class Tutorial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = x.view(-1, 64 * 7 * 7)
        return self.fc2(self.relu(self.fc1(x)))


def normalized(images: Tensor) -> Tensor:
    """As the tutorial does: ToTensor, then Normalize with MNIST's mean and standard deviation."""
    return v2.Normalize((0.1307,), (0.3081,))(v2.ToDtype(torch.float32, scale=True)(images))


@pytest.fixture
def tutorial() -> Tutorial:
    torch.manual_seed(0)
    return Tutorial()


@pytest.fixture
def ours(tutorial: Tutorial, tmp_path: Path) -> ConvNet:
    """ConvNet with the state dict that the tutorial's script would save."""
    torch.save(tutorial.state_dict(), tmp_path / "convnet.pt")
    model = ConvNet()
    model.load_state_dict(torch.load(tmp_path / "convnet.pt", weights_only=True), strict=True)
    return model


@pytest.fixture(params=["noise", "digits"])
def images(request: pytest.FixtureRequest) -> Tensor:
    if request.param == "digits":  # mostly background: every window of the pooling there is a tie
        return load_digits().train.images[:64]
    return torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(10, (64,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_the_tutorials(training: bool, ours: ConvNet, tutorial: Tutorial, images: Tensor) -> None:
    with torch.inference_mode(not training):
        logits, expected = ours.train(training)(images), tutorial(normalized(images))
    assert logits.shape == (64, 10)
    assert (logits - expected).abs().max() < TOLERANCE
    assert (ours(images[5:6]) - expected[5:6]).abs().max() < TOLERANCE  # an image doesn't depend on its batch


def test_gradients_and_training_are_the_tutorials(
    ours: ConvNet, tutorial: Tutorial, images: Tensor, labels: Tensor
) -> None:
    """With the default optimizer: SGD, lr 0.01, momentum 0.9; two steps, so that the momentum counts."""
    optimizers = ours.configure_optimizers(), torch.optim.SGD(tutorial.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        for model, seen, optimizer in zip((ours, tutorial), (images, normalized(images)), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(seen), labels).backward()
            optimizer.step()
        for (name, mine), theirs in zip(ours.named_parameters(), tutorial.parameters(), strict=True):
            assert theirs.grad.abs().max() > 0, name
            assert (mine.grad - theirs.grad).abs().max() < TOLERANCE, name
            assert (mine - theirs).abs().max() < TOLERANCE, name


def test_num_classes_is_the_number_of_logits() -> None:
    model = ConvNet(num_classes=26)
    images, labels = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 10, 20, 25])
    logits = model(images)
    assert logits.shape == (4, 26)
    model.val_acc.update(logits, labels)
    assert model.val_acc.compute() == (logits.argmax(1) == labels).float().mean()


@pytest.mark.parametrize(("images", "got"), [
    (torch.linspace(0, 1, 1568).view(2, 1, 28, 28), "float32 (2, 1, 28, 28), in [0, 1]"),
    (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8 (2, 1, 32, 32)"),
    (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), "uint8 (2, 3, 28, 28)"),
    (torch.zeros(28, 28, dtype=torch.int64), "int64 (28, 28)"),
])  # fmt: skip
def test_other_images_are_refused(images: Tensor, got: str) -> None:
    with pytest.raises(UserError) as raised:
        ConvNet()(images)
    remedy = "give the pixels unscaled: the model normalises them itself."
    if got.startswith("uint8"):
        remedy = "convert them, or use --model ResNet18, which takes grey or colour."
    assert str(raised.value) == f"expected uint8 images (B, 1, 28, 28), 0 to 255\ngot {got}\n{remedy}"


@pytest.mark.parametrize("name", ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc1.weight"])
def test_weight_that_is_nan_shows_in_the_logits(name: str, ours: ConvNet, images: Tensor) -> None:
    dict(ours.named_parameters())[name].data[0] = torch.nan
    with torch.inference_mode():
        assert ours(images).isnan().all()
