"""ResNet18: torchvision's features, frozen in every mode, weights from anywhere or a reason."""

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import InterpolationMode, v2

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.resnet import ResNet18


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights as torchvision has them, `fc` 1000 wide, with running statistics that aren't 0 and 1."""
    torch.manual_seed(0)
    network = resnet18(num_classes=1000)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked += 7
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(weights: Path) -> ResNet18:
    model = ResNet18(weights=str(weights), image_size=32)
    model.load_pretrained()
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone_unchanged(model: ResNet18) -> Iterator[None]:
    """Fails the test if a parameter or a running statistic of the backbone differs afterwards, by a bit."""
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    assert len(before) == 120  # 20 convolutions, 20 BatchNorms with 5 values each; fc is gone
    yield
    after = model.backbone.state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


def trainer(path: Path, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(default_root_dir=path, accelerator="cpu", max_epochs=1, limit_train_batches=3, **quiet, **settings)


@pytest.fixture
def data() -> MNISTDataModule:
    return MNISTDataModule(source="digits", batch_size=8, val_size=2000)


def untrained_loss(model: ResNet18, images: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), torch.arange(len(images)))


# ---- What is trained, and what is not


LAYERS = ("conv1 bn1", "layer1", "layer2", "layer3", "layer4")  # 5 trainable layers are all of these, 1 is the last


def of_layers(model: ResNet18, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameters and statistics of these layers, by name."""
    wanted = tuple(f"{name}." for layer in names for name in layer.split())
    return {name: value.clone() for name, value in model.backbone.state_dict().items() if name.startswith(wanted)}


@pytest.mark.parametrize("trainable", range(6))
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_trainable_layers_are_trained_and_the_others_stay_as_they_are(
    trainable: int, weights: Path, data: MNISTDataModule, tmp_path: Path
) -> None:
    model = ResNet18(weights=str(weights), image_size=28, trainable_layers=trainable)
    model.load_pretrained()
    frozen, trained = LAYERS[: 5 - trainable], LAYERS[5 - trainable :]
    before, before_trained = of_layers(model, frozen), of_layers(model, trained)
    assert len(before) + len(before_trained) == 120
    trainer(tmp_path).fit(model, data)
    after, after_trained = of_layers(model, frozen), of_layers(model, trained)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in before_trained if torch.equal(before_trained[name], after_trained[name])] == []


@pytest.mark.parametrize("scheduler", [
    None,
    pytest.param({"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}, id="StepLR"),
    pytest.param({"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1}}, id="OneCycleLR"),
])  # fmt: skip
def test_backbone_learns_at_its_share_of_the_heads_rate(scheduler: Any, data: MNISTDataModule, tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(ResNet18, "model")
    arguments = {"weights": "none", "image_size": 28, "trainable_layers": 1, "backbone_lr_factor": 0.25}
    made = parser.instantiate_classes(parser.parse_object({"model": arguments | {"scheduler": scheduler}}))
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer(tmp_path, callbacks=Rates()).fit(made.model, data)
    head, backbone = zip(*rates, strict=True)
    assert backbone == pytest.approx([0.25 * rate for rate in head])
    assert scheduler is None or len(set(head)) > 1 or "StepLR" in scheduler["class_path"]


def test_weights_of_a_checkpoint_with_other_classes_get_a_new_head(weights: Path, tmp_path: Path) -> None:
    source = ResNet18(weights=str(weights), image_size=28)
    source.load_pretrained()
    source.head = nn.Linear(512, 3)
    hyperparameters = {"_class_path": "mnist_lightning.resnet.ResNet18"}
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": hyperparameters}, tmp_path / "run.ckpt")
    model = ResNet18(weights=str(tmp_path / "run.ckpt"), image_size=28)
    model.load_pretrained()
    assert model.head.out_features == 10
    layer, original = model.backbone.layer4[1].conv2, source.backbone.layer4[1].conv2
    assert torch.equal(layer.weight, original.weight)


def test_normalized_features_have_mean_0_and_variance_1(model: ResNet18, weights: Path, images: Tensor) -> None:
    normalized = ResNet18(weights=str(weights), image_size=32, normalize_features=True)
    normalized.load_pretrained()
    with torch.no_grad():
        features = model.features(images)
        expected = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(normalized(images), normalized.head(expected))


def test_5130_of_11181642_parameters_are_trained(model: ResNet18) -> None:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    assert sum(size for size, _ in sizes) == 11_181_642
    assert sum(size for size, trained in sizes if trained) == 5_130


def test_optimizer_gets_the_head_alone(model: ResNet18) -> None:
    (group,) = model.configure_optimizers().param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(model.head.weight), id(model.head.bias)}
    assert (group["lr"], group["momentum"]) == (0.001, 0.9)


@pytest.mark.usefixtures("backbone_unchanged")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_backbone_stays_fixed_while_the_head_learns(model: ResNet18, data: MNISTDataModule, tmp_path: Path) -> None:
    before = model.head.weight.detach().clone()
    trainer(tmp_path).fit(model, data)
    assert not torch.equal(model.head.weight, before)
    assert model.training and not any(module.training for module in model.backbone.modules())


@pytest.mark.usefixtures("backbone_unchanged")
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_backbone_stays_fixed_in(command: str, model: ResNet18, data: MNISTDataModule, tmp_path: Path) -> None:
    getattr(trainer(tmp_path, limit_test_batches=1, limit_predict_batches=1), command)(model, data)


@pytest.mark.usefixtures("backbone_unchanged")
@pytest.mark.parametrize("mode", [True, False])
def test_backbone_stays_fixed_after_train(mode: bool, model: ResNet18, images: Tensor) -> None:
    evaluated = model.eval()(images)
    assert torch.equal(model.train(mode)(images), evaluated)  # running statistics, not the batch's


@pytest.mark.usefixtures("backbone_unchanged")
def test_backbone_stays_fixed_in_export(model: ResNet18, images: Tensor) -> None:
    exported = torch.export.export(model.train(True), (images,)).module()
    torch.testing.assert_close(exported(images), model(images), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("backbone_unchanged")
def test_no_gradient_reaches_the_backbone(model: ResNet18, images: Tensor) -> None:
    untrained_loss(model.train(), images).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "head.weight",
        "head.bias",
    ]


# ---- The features


@pytest.mark.parametrize("size", [28, 64])
def test_features_are_torchvisions_of_images_prepared_with_torchvision(
    size: int, model: ResNet18, weights: Path, images: Tensor
) -> None:
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    prepare = v2.Compose(
        [
            v2.Grayscale(num_output_channels=3),
            v2.ToDtype(torch.float64, scale=True),
            v2.Resize(size, InterpolationMode.BILINEAR, antialias=False),
            v2.Normalize(preset.mean, preset.std),
        ]
    )
    reference = resnet18(num_classes=1000)
    reference.load_state_dict(torch.load(weights, weights_only=True))
    reference.fc = nn.Identity()
    expected = reference.double().eval()(prepare(images))
    model.image_size = size
    assert expected.shape == (8, 512) and expected.std() > 0.01
    torch.testing.assert_close(model.double().features(images), expected, atol=1e-6, rtol=0)  # mean and std are float32
    torch.testing.assert_close(model.float().features(images).double(), expected, atol=1e-4, rtol=0)


def test_logits_are_a_linear_map_of_the_features(model: ResNet18, images: Tensor) -> None:
    expected = model.features(images) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_forward_without_weights_is_refused(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"only just built\ncall model\.load_pretrained\(\)"):
        ResNet18(weights="none")(images)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_trainer_without_weights_is_refused(command: str, data: MNISTDataModule, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only just built"):
        getattr(trainer(tmp_path), command)(ResNet18(weights="none"), data)


# ---- Where the weights come from


@pytest.mark.parametrize("classes", [1000, 10, 3])
def test_state_dict_with_any_fc_is_taken(classes: int, weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state |= {"fc.weight": torch.ones(classes, 512), "fc.bias": torch.ones(classes)}
    torch.save(state, tmp_path / "w.pth")
    model = ResNet18(weights=str(tmp_path / "w.pth"))
    head = model.head.weight.detach().clone()
    model.load_pretrained()
    loaded = model.backbone.state_dict()
    assert [name for name in loaded if not torch.equal(loaded[name], state[name])] == []
    assert torch.equal(model.head.weight, head)


def test_checkpoint_of_this_project_is_taken_as_weights(model: ResNet18, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "run.ckpt")
    other = ResNet18(weights=str(tmp_path / "run.ckpt"))
    other.load_pretrained()
    loaded, expected = other.backbone.state_dict(), model.backbone.state_dict()
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []
    assert not torch.equal(other.head.weight, model.head.weight)  # the head is trained anew


def test_weights_none_says_that_the_features_are_random(capsys: pytest.CaptureFixture[str], images: Tensor) -> None:
    model = ResNet18(weights="none")
    model.load_pretrained()
    assert "WARNING: --model.weights none: the frozen backbone's features are random." in capsys.readouterr().out
    assert model(images).shape == (8, 10)


def test_weights_are_read_once(model: ResNet18, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.weights = "none"  # a second reading would warn
    model.load_pretrained()
    assert capsys.readouterr().out == ""


def test_checkpoint_brings_its_own_weights(model: ResNet18, tmp_path: Path, images: Tensor) -> None:
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    content["hyper_parameters"]["weights"] = "/gone/resnet18.pth"
    torch.save(content, tmp_path / "run.ckpt")
    loaded = ResNet18.load_from_checkpoint(tmp_path / "run.ckpt")
    assert torch.equal(loaded(images), model(images))


WRONG_WEIGHTS = {
    "another network's": ({"conv1.weight": torch.zeros(32, 1, 3, 3)}, "holds something else"),
    "a list": ([1, 2], "holds something else"),
    "a checkpoint without a backbone": ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "holds something else"),
    # BUG at the time of writing: AttributeError, 'int' object has no attribute 'items'.
    "a state dict that is none": ({"state_dict": 3}, "holds something else"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_other_content_is_refused(case: str, tmp_path: Path) -> None:
    content, message = WRONG_WEIGHTS[case]
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"^expected .*\ngot {path}.*{message}\ngive --model.weights another file"):
        ResNet18(weights=str(path)).load_pretrained()


@pytest.mark.parametrize("change", ["wrong shape", "missing", "too many", "no tensor"])
def test_wrong_state_dict_is_refused_by_the_name_that_is_wrong(change: str, weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    match change:
        case "wrong shape":
            state["layer2.0.conv1.weight"] = torch.zeros(64, 64, 3, 3)
        case "missing":
            del state["layer2.0.conv1.weight"]
        case "too many":
            state["layer2.0.conv1.weight2"] = torch.zeros(1)
        case "no tensor":
            state["layer2.0.conv1.weight"] = "zeros"
    torch.save(state, tmp_path / "w.pth")
    model = ResNet18(weights=str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"in torchvision's names\ngot .*w\.pth: .*layer2\.0\.conv1\.weight.*\ngive --"):
        model.load_pretrained()


# ---- ImageNet's weights, from a server on this machine


@pytest.fixture
def imagenet(server: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """torchvision's address, led to `server`, and the folder that the file belongs in."""
    body = weights.read_bytes()
    name = f"resnet18-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server.answers[f"/{name}"] = body
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    url = SimpleNamespace(url=f"{server.url}/{name}")
    monkeypatch.setattr("torchvision.models.ResNet18_Weights", SimpleNamespace(IMAGENET1K_V1=url))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    yield SimpleNamespace(server=server, path=f"/{name}", body=body, folder=folder, file=folder / name)
    gc.collect()


# torch.hub leaves its connection to the garbage collector, which comes while the test still has this filter.
leaves_sockets = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@leaves_sockets
def test_imagenet_weights_are_downloaded_once(imagenet: SimpleNamespace, weights: Path, images: Tensor) -> None:
    models = [ResNet18(image_size=28), ResNet18(image_size=28), ResNet18(str(weights), image_size=28)]
    for model in models:
        model.load_pretrained()
    assert imagenet.server.requests == [imagenet.path]
    assert imagenet.file.read_bytes() == imagenet.body
    features = [model.features(images) for model in models]
    assert torch.equal(features[0], features[2]) and torch.equal(features[1], features[2])


BAD_SERVERS = {
    "has not got it": (None, "404"),
    "sends a wrong bit": (lambda body: body[:-1] + bytes([body[-1] ^ 1]), "invalid hash value"),
    "sends half": (lambda body: body[: len(body) // 2], "invalid hash value"),
    "sends nothing": (lambda body: b"", "invalid hash value"),
}


@leaves_sockets
@pytest.mark.parametrize("case", BAD_SERVERS)
def test_failed_download_names_the_file_the_folder_and_the_ways_out(case: str, imagenet: SimpleNamespace) -> None:
    spoil, reason = BAD_SERVERS[case]
    if spoil is None:
        del imagenet.server.answers[imagenet.path]
    else:
        imagenet.server.answers[imagenet.path] = spoil(imagenet.body)
    with pytest.raises(UserError) as raised:
        ResNet18().load_pretrained()
    expected, got, remedy = str(raised.value).split("\n")
    assert str(imagenet.file) in expected
    assert reason in got and imagenet.server.url in got
    assert "--model.weights PATH" in remedy and "--model.weights none" in remedy
    left = [path.name for path in imagenet.folder.iterdir() if not path.name.startswith(".")]
    assert left == []  # a half-written file would be taken for the weights next time


def test_damaged_file_in_torchs_folder_is_explained(imagenet: SimpleNamespace) -> None:
    imagenet.folder.mkdir(parents=True)
    imagenet.file.write_bytes(imagenet.body[:1000])
    with pytest.raises(UserError, match=f"weights at {imagenet.file}"):
        ResNet18().load_pretrained()
