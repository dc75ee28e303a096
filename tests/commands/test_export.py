"""Exported files: they answer as the checkpoint does, say what they are, and aren't written otherwise."""

import importlib.util
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from running import command
from scipy.special import softmax
from torch import Tensor, nn

import mnist_lightning
from mnist_lightning import ConvNet, DigitClassifier, __version__, load_model
from mnist_lightning.commands import export
from mnist_lightning.commands.cli import run
from mnist_lightning.photos.reading import read_squares
from mnist_lightning.sources import load_digits

needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime", "safetensors")),
    reason="the extra `export` isn't installed: pip install '.[export]'",
)
# torch.export and the ONNX exporter warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Colours(DigitClassifier):
    """A model of somebody's own: any dtype, any size, three channels."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1), num_classes=num_classes)
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.float().mean((2, 3)))


class Branches(Colours):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


def save(model: DigitClassifier, path: Path, **more: Any) -> str:
    """Writes a checkpoint of a model that nobody trained; returns its path."""
    content: dict[str, Any] = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict(), **more}
    model.on_save_checkpoint(content)
    torch.save({"pytorch-lightning_version": lightning.__version__, **content}, path)
    return str(path)


@pytest.mark.parametrize(("name", "suffix"), [
    pytest.param("convnet", ".onnx", marks=needs_extra),
    ("convnet", ".pt2"),
    pytest.param("convnet", ".safetensors", marks=needs_extra),
    pytest.param("resnet", ".onnx", marks=needs_extra),
    pytest.param("resnet", ".pt2", marks=pytest.mark.slow),
    pytest.param("resnet", ".safetensors", marks=[needs_extra, pytest.mark.slow]),
])  # fmt: skip
def test_file_answers_as_the_checkpoint_and_says_what_it_is(
    name: str, suffix: str, request: pytest.FixtureRequest
) -> None:
    checkpoint, output = request.getfixturevalue(name) / "checkpoints" / "best.ckpt", Path(f"model{suffix}")
    said = command("export", "--ckpt_path", checkpoint, "--output", output)
    assert re.search(r" of 1,000 images \(scikit-learn's digits\) classified the same, (as \d+ of 10|all as)", said)
    for place in (Path(mnist_lightning.__file__).parents[1], Path(torch.__file__).parent, Path.cwd()):
        assert bytes(place) not in output.read_bytes()  # a folder of this machine
    model = load_model(checkpoint)
    for batch in load_digits().test.images[:34].split([1, 33]):  # the batch size is free
        if suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(str(output))
            assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
            logits = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
            said = session.get_modelmeta().custom_metadata_map
        elif suffix == ".pt2":
            extra = {"metadata.json": ""}
            logits = torch.export.load(output, extra_files=extra).module()(batch)
            said = json.loads(extra["metadata.json"])
        else:
            from safetensors import safe_open
            from safetensors.torch import load_file

            fresh = load_model(checkpoint)
            for parameter in fresh.parameters():
                parameter.data.zero_()
            fresh.load_state_dict(load_file(output))
            logits = fresh(batch)
            with safe_open(output, "pt") as file:
                said = file.metadata()
        with torch.no_grad():
            torch.testing.assert_close(logits, model(batch), rtol=0, atol=1e-4)
    assert said["model"] == type(model).__name__ and said["data"] == "digits"
    assert json.loads(said["classes"]) == list("0123456789")
    assert said["version"] == f"mnist_lightning {__version__}"


@pytest.mark.parametrize(("model", "more", "check", "input", "classes"), [
    (ConvNet(num_classes=26), {}, "scikit-learn's digits", "uint8 images (B, 1, 28, 28), 0 = background, 255 = strokes",
     [str(label) for label in range(26)]),
    (Colours(), {"example_input": {"shape": [3, 8, 6], "dtype": "float32"}, "class_names": ["cat", "dog", "owl"]},
     "random in [0, 1]", "float32 images (B, 3, 8, 6)", ["cat", "dog", "owl"]),
    (Colours(), {"example_input": {"shape": [3, 8, 6], "dtype": "uint8"}}, "random in 0 to 255",
     "uint8 images (B, 3, 8, 6)", ["0", "1", "2"]),
], ids=["26 classes", "floats", "uint8"])  # fmt: skip
def test_model_of_other_images_and_classes_is_exported_as_its_checkpoint_says(
    model: DigitClassifier, more: dict[str, Any], check: str, input: str, classes: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if isinstance(model, Colours):
        nn.init.zeros_(model.head.weight)  # it answers the same for all
        nn.init.eye_(model.head.bias.data[None])
    export.export(save(model, tmp_path / "a.ckpt", **more), str(tmp_path / "model.pt2"))
    spread = f"all as {classes[0]}, " if isinstance(model, Colours) else "as "
    assert f"of 1,000 images ({check}) classified the same, {spread}" in capsys.readouterr().out
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    said = json.loads(extra["metadata.json"])
    assert said["input"] == input and said["output"] == f"logits (B, {len(classes)})"
    assert json.loads(said["classes"]) == classes


@needs_extra
def test_file_of_a_model_of_pictures_is_checked_on_them_and_answers_as_the_checkpoint(pictures: Path) -> None:
    import onnxruntime

    said = command("export", "--ckpt_path", "best", "--output", "model.onnx")
    assert "6 of 6 images (of its test pictures) classified the same, as 2 of 2 classes" in said
    session = onnxruntime.InferenceSession("model.onnx")
    files = sorted(Path("photos").glob("*/[0-9]*"))
    images, _ = read_squares(files, 32)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    answers = load_model(pictures / "checkpoints" / "best.ckpt").classify(files)
    for answer, p in zip(answers, softmax(logits, 1), strict=True):
        assert answer == pytest.approx({"ants": p[0], "bees": p[1]}, abs=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert told["input"] == "uint8 images (B, 3, 32, 32), RGB, 0 to 255" and told["data"] == "ImageFolder"
    assert (told["size"], told["resize"]) == ("32", "short side to 37 (256/224 of 32), centre crop")
    Path("photos").rename("moved")
    said = command("export", "--ckpt_path", "best", "--output", "model.safetensors")
    assert "of 1,000 images (random in 0 to 255) classified the same" in said


@pytest.mark.parametrize(("model", "message"), [
    (Colours(), "expected a model that takes uint8 images (B, 1, 28, 28)\n       got RuntimeError: "),
    (Branches(), "expected a model that can be written as .pt2\n       got "),
    (ConvNet(), "expected a file that answers as the checkpoint does\n       got "),
], ids=["other images", "not traceable", "other answers"])  # fmt: skip
def test_what_cannot_be_exported_is_explained_and_not_written(
    model: DigitClassifier, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if isinstance(model, ConvNet):
        broken = export.FORMATS[".pt2"]._replace(read=lambda content, model: lambda images: -model(images))
        monkeypatch.setitem(export.FORMATS, ".pt2", broken)
    more = {"example_input": {"shape": [3, 8, 6], "dtype": "float32"}} if isinstance(model, Branches) else {}
    path = save(model, tmp_path / "a.ckpt", **more)
    assert run(["export", "--ckpt_path", path, "--output", str(tmp_path / "model.pt2")]) == 2
    # torch's own logging may stand above the three lines.
    assert message in "\n".join(capsys.readouterr().err.splitlines()[-3:])
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
