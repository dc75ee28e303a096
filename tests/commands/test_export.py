"""Exported files: they answer as the checkpoint does, say what they are, and aren't written otherwise."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from mnist_lightning import __version__, export, load_model
from mnist_lightning.commands.cli import run
from mnist_lightning.sources import load_digits

needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime", "safetensors")),
    reason="the extra `export` isn't installed: pip install '.[export]'",
)
# torch.export and the ONNX exporter warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
RESNET = ["--model", "ResNet18", "--model.weights", "none", "--model.image_size", "28"]


@pytest.fixture(scope="module", params=["ConvNet", "ResNet18"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    model = RESNET + ["--model.cache_features", "false"] if request.param == "ResNet18" else []
    few = ["--trainer.limit_train_batches", "5", "--trainer.limit_test_batches", "1", "--trainer.max_epochs", "1"]
    assert run(["fit", *model, "--data.source", "digits", "--trainer.default_root_dir", str(root), *few]) == 0
    return next(root.rglob("best.ckpt"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return load_digits().test.images[:33]


@pytest.mark.parametrize("suffix", [
    pytest.param(".onnx", marks=needs_extra), ".pt2", pytest.param(".safetensors", marks=needs_extra)
])  # fmt: skip
def test_file_answers_as_the_checkpoint_and_says_what_it_is(
    suffix: str, checkpoint: Path, images: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"model{suffix}"
    assert run(["export", "--ckpt_path", str(checkpoint), "--output", str(output)]) == 0
    assert "1,000 images: all digits equal" in capsys.readouterr().out
    model = load_model(checkpoint)
    for count in (1, 33):  # the batch size is free
        batch = images[:count]
        if suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(str(output))
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
    assert 0 <= float(said["val_acc"]) <= 1


def test_file_that_answers_otherwise_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = export.FORMATS[".pt2"]._replace(read=lambda content, model: lambda images: -model(images))
    monkeypatch.setitem(export.FORMATS, ".pt2", broken)
    assert run(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "model.pt2")]) == 2
    assert "expected a file that answers as the checkpoint does" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("args", "message"), [
    (["--output", "model.h5"], "expected --output to end in .onnx, .pt2, .safetensors\n       got model.h5"),
    (["--outptu", "model.pt2"], "did you mean --output?"),
    ([], "expected --output"),
])  # fmt: skip
def test_mistakes_are_explained(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--ckpt_path", "best", *args]) == 2
    assert message in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(["export", "--ckpt_path", "best", "--output", "model.onnx"]) == 2
    assert "pip install '.[export]'" in capsys.readouterr().err
