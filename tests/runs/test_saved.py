"""A checkpoint's keys: what is read is this project's, and needs no GPU."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from running import command, loaded, refused

from mnist_lightning.errors import UserError
from mnist_lightning.runs.checkpoints import WholeCheckpointIO
from mnist_lightning.runs.saved import Saved

CONTENT = {"state_dict": {"weight": torch.arange(1000.0)}, "class_path": "a.B", "epoch": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        Saved(path).content
    expected, got, remedy = str(raised.value).split("\n")
    assert expected == "expected a checkpoint of this project"
    assert remedy == "give --ckpt_path best, last or another file."
    return got


def test_checkpoint_comes_back_as_it_was(path: Path) -> None:
    content = Saved(path).content
    assert torch.equal(content["state_dict"]["weight"], torch.arange(1000.0))
    assert (content["epoch"], content["class_path"]) == (3, "a.B")
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"text\n", b"\x80\x05.", b"PK\x03\x04"])
def test_file_that_is_no_checkpoint_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert "which is " in refusal(path)


@pytest.mark.parametrize("content", [
    [], 3, torch.zeros(3), {}, {"state_dict": {}}, {"hyper_parameters": {}}, {"hyper_parameters": {"lr": 1}},
    {"hyper_parameters": 3}, {"class_path": "a.B"}, {**CONTENT, "state_dict": 3},
], ids=repr)  # fmt: skip
def test_content_of_another_kind_is_refused(content: Any, path: Path) -> None:
    torch.save(content, path)
    assert refusal(path) == f"got {path}, which is something else"


@pytest.mark.parametrize(("key", "value"), [
    ("example_input", 3), ("example_input", {"shape": [1, 28, 28]}), ("example_input", {"shape": 28, "dtype": "uint8"}),
    ("example_input", {"shape": [1, -28, 28], "dtype": "uint8"}), ("example_input", {"shape": [1], "dtype": "nn"}),
    ("example_input", {"shape": [3, 64_000, 64_000], "dtype": "float32"}),  # 48 GB
    ("class_names", "abc"), ("class_names", [1, 2]), ("class_names", {"a": 1}),
    ("mnist_lightning", 3), ("mnist_lightning", {"model": 3}), ("mnist_lightning", {"model": {"class_path": 3}}),
    ("mnist_lightning", {"data": {"class_path": "a.B"}}),
    ("mnist_lightning", {"model": {"class_path": "a.B", "init_args": [1]}}),
    ("mnist_lightning", {"model": {"class_path": "a.B"}, "trainer": [1]}),
], ids=str)  # fmt: skip
def test_value_that_somebody_edited_is_refused(key: str, value: Any, path: Path) -> None:
    torch.save({**CONTENT, key: value}, path)
    with pytest.raises(UserError, match=f"^expected a valid {key} in the checkpoint\ngot {path}: "):
        Saved(path)


@pytest.mark.parametrize("change", [
    {"global_step": None}, {"loops": {}}, {"loops": None}, {"generators": {"a": 1}}, {"frozen": -1}, {"gradients": 3},
    {"plateaus": []}, {"training_sums": None}, {"optimizer_states": torch.zeros(3)},
    {"state_dict": {3: torch.zeros(3)}}, {"MNISTDataModule": {}}, {"pytorch-lightning_version": "x"},
], ids=str)  # fmt: skip
def test_fit_does_not_go_on_from_what_somebody_edited(change: dict[str, Any], convnet: Path) -> None:
    path = convnet / "checkpoints" / "last.ckpt"
    torch.save({**loaded(path), **change}, path)
    assert "checkpoint" in refused("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)


def test_checkpoint_of_a_gpu_is_read_without_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")  # as if its tensors lay there
        torch.save(CONTENT, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path)
    assert torch.equal(Saved(path).content["state_dict"]["weight"], torch.arange(1000.0))
    assert WholeCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].device.type == "cpu"


@pytest.mark.parametrize("typed", ["test", "predict", "export --output model.pt2"])
def test_command_reads_its_checkpoint_once(typed: str, convnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = convnet / "checkpoints" / "best.ckpt"
    load = Mock(wraps=torch.load)
    monkeypatch.setattr(torch, "load", load)
    command(*typed.split(), "--ckpt_path", checkpoint)
    assert [str(call.args[0]) for call in load.call_args_list].count(str(checkpoint)) == 1
