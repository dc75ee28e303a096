"""PretrainedClassifier by ResNet18: torchvision's network, frozen in every mode, with weights from anywhere."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, StepLR
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import InterpolationMode, v2

from mnist_lightning import resnet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.pretrained import Features
from mnist_lightning.resnet import ResNet18

PARTS = ("conv1 bn1", "layer1", "layer2", "layer3", "layer4")  # 5 trainable layers are all of these, 1 is the last


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """torchvision's network, `fc` 1000 wide, with running statistics that aren't 0 and 1."""
    torch.manual_seed(0)
    network = resnet18(num_classes=1000)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked += 7
    return network.eval()


@pytest.fixture(scope="module")
def weights(reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file that torchvision would have of it."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    return str(path)


@pytest.fixture
def model(weights: str) -> ResNet18:
    model = ResNet18(weights, image_size=32)
    model.load_pretrained()
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def data() -> MNISTDataModule:
    return MNISTDataModule(source="digits", batch_size=8, train_size=24, val_size=400)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def step(model: ResNet18, images: Tensor) -> None:
    """Trains for a step."""
    optimizer = model.configure_optimizers()
    F.cross_entropy(model.train()(images), torch.arange(len(images))).backward()
    optimizer.step()


# ---- What is trained, and what is not


@pytest.mark.parametrize("trainable", range(6))
def test_trainable_layers_are_trained_and_the_others_stay_as_they_are(
    trainable: int, weights: str, images: Tensor
) -> None:
    by_init = ResNet18(weights, image_size=32, trainable_layers=trainable)
    by_call = ResNet18(weights, image_size=32)
    by_call.train_layers(5)
    by_call.train_layers(trainable)
    for model in (by_init, by_call):
        model.load_pretrained()
        before = copy.deepcopy(model.state_dict())
        step(model, images)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        trained = ("head.", *(f"backbone.{module}." for part in PARTS[5 - trainable :] for module in part.split()))
        assert changed == [name for name in before if name.startswith(trained)]
        with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert with_gradient == [name for name, _ in model.named_parameters() if name.startswith(trained)]


def test_backbone_stays_fixed_whatever_the_mode(model: ResNet18, images: Tensor) -> None:
    before = copy.deepcopy(model.backbone.state_dict())
    assert len(before) == 120  # 20 convolutions, 20 BatchNorms with 5 values each; fc is gone
    evaluated = model.eval()(images)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(images), evaluated)  # running statistics, not the batch's
    assert_equal(model.backbone.state_dict(), before)


@pytest.mark.parametrize(("schedule", "arguments"), [
    (StepLR, {"step_size": 1}),
    (OneCycleLR, {"max_lr": 0.1, "total_steps": 4}),
    (CyclicLR, {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2}),
])  # fmt: skip
def test_backbone_learns_at_its_share_of_the_heads_rate(schedule: Any, arguments: dict[str, Any]) -> None:
    chosen = partial(schedule, **arguments)
    model = ResNet18("none", trainable_layers=1, backbone_lr_factor=0.25, scheduler=chosen)
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    heads, backbones = zip(*rates, strict=True)
    assert backbones == pytest.approx([0.25 * rate for rate in heads])
    assert len(set(heads)) == 3


def test_layer_that_was_replaced_is_trained(images: Tensor) -> None:
    model = ResNet18("none", 28, trainable_layers=5)
    model.load_pretrained()
    model.backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the usual change for small images
    before = model.backbone.conv1.weight.detach().clone()
    step(model, images)
    assert not torch.equal(model.backbone.conv1.weight, before)


# ---- The features


@pytest.mark.parametrize("size", [28, 64])
def test_logits_are_a_linear_map_of_torchvisions_features(
    size: int, model: ResNet18, reference: nn.Module, images: Tensor
) -> None:
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    prepare = v2.Compose([
        v2.Grayscale(num_output_channels=3),
        v2.ToDtype(torch.float64, scale=True),
        v2.Resize(size, InterpolationMode.BILINEAR, antialias=False),
        v2.Normalize(preset.mean, preset.std),
    ])  # fmt: skip
    network = copy.deepcopy(reference).double()
    network.fc = nn.Identity()
    features = network(prepare(images))
    assert features.shape == (8, 512) and features.std() > 0.01
    expected = F.linear(features, model.head.weight.double(), model.head.bias.double())
    model.image_size = size
    torch.testing.assert_close(model.double()(images), expected, atol=1e-6, rtol=0)  # mean and std are float32
    torch.testing.assert_close(model.float()(images).double(), expected, atol=1e-4, rtol=0)
    one = model(images[5:6]).double()  # no image depends on its batch
    torch.testing.assert_close(one, expected[5:6], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("shape", "size", "seen"), [
    ((1, 28, 28), None, (64, 64)), ((1, 28, 28), 32, (32, 32)), ((3, 28, 28), None, (64, 64)),
    ((3, 40, 50), None, (40, 50)), ((1, 64, 64), None, (64, 64)), ((3, 40, 50), 32, (32, 32)),
])  # fmt: skip
def test_image_size_is_64_for_28_by_28_and_else_the_images_own(
    shape: tuple[int, ...], size: int | None, seen: tuple[int, int], model: ResNet18
) -> None:
    model.image_size = size
    images = torch.randint(256, (2, *shape), dtype=torch.uint8)
    assert model.prepare(images).shape == (2, 3, *seen)
    assert model(images).shape == (2, 10)


def test_grey_and_colour_images_of_the_same_pixels_are_the_same_to_it(model: ResNet18, images: Tensor) -> None:
    assert torch.equal(model(images.expand(-1, 3, -1, -1)), model(images))


def test_forward_goes_on_from_the_layer_that_features_have_passed(model: ResNet18, images: Tensor) -> None:
    expected, values = model(images), model.prepare(images)
    for passed, layer in enumerate(model.layers):
        torch.testing.assert_close(model(Features(values, passed)), expected)
        values = layer(values)
    assert values.shape == (8, 512)
    torch.testing.assert_close(model(Features(values, len(model.layers))), expected)


def test_normalized_features_have_mean_0_and_variance_1_and_one_alone_the_running_ones(
    weights: str, images: Tensor
) -> None:
    model = ResNet18(weights, image_size=32, normalize_features=True)
    model.load_pretrained()
    with torch.no_grad():
        features = model.prepare(images)
        for layer in model.layers:
            features = layer(features)
        expected = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(model(images), model.head(expected))
        alone = model(images[:1])
        torch.testing.assert_close(alone, model.eval()(images[:1]))


@pytest.mark.parametrize("shape", [(8, 2, 28, 28), (8, 1, 27, 40), (28, 28)])
def test_images_that_it_cannot_take_are_refused(shape: tuple[int, ...], model: ResNet18) -> None:
    with pytest.raises(UserError, match="uint8 images|of 28 pixels a side and more"):
        model(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(8, 1, 28, 28), (8, 512)])
def test_floats_are_refused_not_taken_for_features(shape: tuple[int, ...], model: ResNet18) -> None:
    with pytest.raises(UserError, match=r"expected uint8 images \(B, 1 or 3, H, W\), .*\ngot float32 \(8, "):
        model(torch.rand(shape))


# ---- Where the weights come from


@pytest.mark.parametrize("command", ["forward", "validate", "test", "predict"])
def test_model_without_weights_is_refused(
    command: str, data: MNISTDataModule, images: Tensor, quiet: Callable
) -> None:
    model = ResNet18("none")
    with pytest.raises(UserError, match=r"only just built\ncall model\.load_pretrained\(\)"):
        model(images) if command == "forward" else getattr(quiet(), command)(model, data)


@pytest.mark.parametrize("classes", [1000, 10, 3])
def test_state_dict_with_any_fc_is_taken_and_the_head_is_new(classes: int, weights: str, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state |= {"fc.weight": torch.ones(classes, 512), "fc.bias": torch.ones(classes)}
    torch.save(state, tmp_path / "w.pth")
    model = ResNet18(str(tmp_path / "w.pth"))
    head = model.head.weight.detach().clone()
    model.load_pretrained()
    assert_equal(model.backbone.state_dict(), state)
    assert torch.equal(model.head.weight, head)


def test_imagenet_is_torchvisions_file(weights: str, monkeypatch: pytest.MonkeyPatch, model: ResNet18) -> None:
    monkeypatch.setattr(resnet, "imagenet_weights", lambda: Path(weights))
    other = ResNet18()
    other.load_pretrained()
    assert_equal(other.backbone.state_dict(), model.backbone.state_dict())


def test_checkpoint_of_this_project_with_other_classes_is_taken_as_weights(
    weights: str, images: Tensor, tmp_path: Path, quiet: Callable
) -> None:
    source = ResNet18(weights, num_classes=3)
    source.load_pretrained()
    assert source(images).shape == (8, 3)
    trainer = quiet()
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = ResNet18(str(tmp_path / "run.ckpt"))
    other.load_pretrained()
    assert_equal(other.backbone.state_dict(), source.backbone.state_dict())
    assert other(images).shape == (8, 10)


def test_weights_none_says_so_once(capsys: pytest.CaptureFixture[str], images: Tensor) -> None:
    model = ResNet18("none", image_size=32)
    for _ in range(2):  # the weights are loaded once: a second time would draw or read new ones
        model.load_pretrained()
    assert capsys.readouterr().out == "WARNING: --model.weights none: the backbone's weights are random.\n"
    assert model(images).shape == (8, 10)


@pytest.mark.parametrize(("content", "reason"), [
    ({"conv1.weight": torch.zeros(32, 1, 3, 3)}, '"bn1.weight"'),  # another network's
    ({"state_dict": {"conv1.weight": torch.zeros(1)}}, '"bn1.weight"'),  # a checkpoint without a backbone
    ({"state_dict": 3}, "int"),
    ({1: 2}, "int"),
    ([1, 2], "list"),
])  # fmt: skip
def test_file_that_holds_something_else_is_refused(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"^expected ResNet18's .*\ngot {path}: .*{reason}.*\ngive --model"):
        ResNet18(str(path)).load_pretrained()


@pytest.mark.parametrize("change", [
    {"layer2.0.conv1.weight": torch.zeros(64, 64, 3, 3)},
    {"layer2.0.conv1.weight": None},
    {"layer2.0.conv1.weight": "zeros"},
    {"layer2.0.conv1.weight2": torch.zeros(1)},
], ids=["another shape", "missing", "no tensor", "one too many"])  # fmt: skip
def test_wrong_state_dict_is_refused_by_the_name_that_is_wrong(
    change: dict[str, Any], weights: str, tmp_path: Path
) -> None:
    state = {**torch.load(weights, weights_only=True), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"^expected ResNet18's .*\ngot .*w\.pth: .*layer2\.0\.conv1\.weight.*\ngive"):
        ResNet18(str(tmp_path / "w.pth")).load_pretrained()
