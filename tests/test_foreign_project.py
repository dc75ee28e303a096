"""A project that isn't MNIST, tests/foreign_project/, goes through every command; the page make-it-yours.md is run.

Its letters are RGB floats of 40×40 in 26 classes or 2, from a datamodule that knows nothing of this package.
"""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase

import pytest
import running
import torch
from foreign_project.data import Letters
from foreign_project.models import Deep, Plain, Reader
from running import READER, Few, Fit, loaded, process, rows
from sklearn.metrics import f1_score

from mnist_lightning import load_model

ROOT = Path(__file__).parents[1]
PLAIN = READER.replace("Reader", "Plain") + " --monitor val/loss --monitor_mode min --trainer.max_epochs 2"
QUIET = "--pictures false --trainer.max_epochs 1"
EPOCH = 20  # steps: 156 images, 8 a batch

pytestmark = pytest.mark.usefixtures("letters")


def command(typed: str) -> str:
    return running.command(*shlex.split(typed))


def accuracy(printed: str) -> float:
    return float(running.accuracy(printed))


def checkpoint(name: str, model: str = "Reader") -> Path:
    return Path("lightning_logs", model, "version_0", "checkpoints", f"{name}.ckpt")


def results(name: str, model: str = "Reader") -> Path:
    return Path("lightning_logs", model, "version_0", f"{name}.csv")


def steps() -> int:
    """Of the last checkpoint of the only run."""
    (path,) = Path("lightning_logs").rglob("last.ckpt")
    return loaded(path)["global_step"]


def logits_and_labels(path: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a checkpoint on a part of the letters, by a plain loop."""
    model, data = load_model(path), Letters("letters")
    data.setup("test")
    images, labels = zip(*getattr(data, f"{part}_set"), strict=True)
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(labels)


# ---- Letters


def test_commands_agree_about_26_classes_of_colour_images(reader: str) -> None:
    assert "Pictures: no" not in reader
    assert steps() == 3 * EPOCH
    assert accuracy(reader) > 20  # 3.8 by chance
    assert accuracy(command("test --ckpt_path best")) == accuracy(reader)
    logits, labels = logits_and_labels(checkpoint("best"), "test")
    assert accuracy(reader) == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=0.01)
    measured = [float(row["val/acc"]) for row in rows(results("metrics")) if row["val/acc"]]
    assert accuracy(command("validate --ckpt_path best")) == pytest.approx(100 * max(measured), abs=0.01)
    command("predict --ckpt_path best")
    predictions = rows(results("predictions"))
    assert list(predictions[0]) == ["index", "label", "predicted", *(f"p{letter}" for letter in ascii_uppercase)]
    assert [row["label"] for row in predictions] == [ascii_uppercase[label] for label in labels]
    assert [row["predicted"] for row in predictions] == [ascii_uppercase[label] for label in logits.argmax(1)]
    assert "1,000 of 1,000 images" in command("export --ckpt_path best --output reader.pt2")
    data = Letters("letters")
    data.setup("test")
    images = torch.stack([image for image, _ in data.test_set])
    torch.testing.assert_close(torch.export.load("reader.pt2").module()(images), logits)


def test_two_classes_do_too_and_images_may_have_no_labels_and_classes_no_names() -> None:
    nameless = READER.replace("Letters", "Nameless")
    printed = command(f"fit {nameless} --model.num_classes 2 --data.data_dir two --pictures false")
    assert accuracy(printed) > 75  # 50 by chance
    command("predict --ckpt_path best")
    predictions = rows(results("predictions"))
    assert (list(predictions[0]), len(predictions)) == (["index", "predicted", "p0", "p1"], 20)


def test_metric_of_ones_own_chooses_the_best_checkpoint_beside_ones_own_callback_and_logger() -> None:
    own = "--trainer.callbacks+=foreign_project.extras.Diary --trainer.logger+=foreign_project.extras.Table"
    command(f"fit {READER} {own} --monitor val/f1 --pictures false")
    measured = [float(row["val/f1"]) for row in rows(results("metrics")) if row["val/f1"]]
    assert [float(row["val/f1"]) for row in rows(Path("tables", "metrics.csv")) if row.get("val/f1")] == measured
    assert Path("diary.txt").read_text().splitlines() == [f"{epoch} {(epoch + 1) * EPOCH}" for epoch in range(3)]
    logits, labels = logits_and_labels(checkpoint("best"), "val")
    seen = sorted(set(labels.tolist()) | set(logits.argmax(1).tolist()))
    f1 = f1_score(labels, logits.argmax(1), labels=seen, average="macro", zero_division=0.0)
    assert max(measured) == pytest.approx(f1, abs=1e-6)


def test_plain_lightning_module_is_trained_tested_and_resumed(quiet: Callable) -> None:
    printed = command(f"fit {PLAIN}")
    (loss,) = re.findall(r"test/loss (\S+)", printed)
    assert f"test/loss {loss}\n" in command("test --ckpt_path best") and "Your digits" not in printed
    best = loaded(checkpoint("best", "Plain"))
    model = Plain()
    model.load_state_dict(best["state_dict"])
    (again,) = quiet().test(model, Letters("letters"), verbose=False)
    assert f"{again['test/loss']:.4f}" == loss
    command("predict --ckpt_path best")
    assert list(rows(results("predictions", "Plain"))[0])[2:4] == ["output A", "output B"]
    command("fit --ckpt_path last --trainer.max_epochs 3")
    assert steps() == 3 * EPOCH


@pytest.mark.parametrize("by", ["--data foreign_project.data.Letters", "a file", "JSON"])
def test_class_of_ones_own_starts_from_its_own_defaults(by: str, capsys: pytest.CaptureFixture[str]) -> None:
    if by == "a file":
        Path("data.yaml").write_text("class_path: foreign_project.data.Letters\n")
        by = "--data data.yaml"
    elif by == "JSON":
        by = """--data '{"class_path": "foreign_project.data.Letters"}'"""
    config = running.printed_config(capsys, "fit", "--model", "foreign_project.models.Reader", *shlex.split(by))
    assert config["data"]["init_args"] == {"data_dir": "letters", "batch_size": 8}
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_fit_resumed_at_an_epochs_end_is_the_undisturbed_one(reader_fit: Fit) -> None:
    command(f"fit {READER} {QUIET}")
    torch.randn(3)  # somebody else draws
    command("fit --ckpt_path last --trainer.max_epochs 3")
    whole, parts = (loaded(root / checkpoint("last")) for root in (reader_fit.root, Path()))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name


def test_plain_trainer_takes_it_through_fit_test_predict_and_resuming(quiet: Callable) -> None:
    torch.manual_seed(0)
    model, data, trainer = Reader(), Letters("letters"), quiet(max_epochs=3)
    trainer.fit(model, data)
    assert trainer.global_step == 3 * EPOCH
    (results,) = trainer.test(model, data, verbose=False)
    answers = torch.cat([answer["probabilities"].argmax(1) for answer in trainer.predict(model, data)])
    labels = torch.tensor(data.test_set.targets)
    assert results["test/acc"] == pytest.approx((answers == labels).float().mean().item())
    assert results["test/acc"] > 0.2
    trainer.save_checkpoint("reader.ckpt")
    again = load_model("reader.ckpt")
    assert isinstance(again, Reader) and again.num_classes == 26
    assert quiet().test(again, data, verbose=False) == [results]
    resumed = quiet(max_epochs=4)
    resumed.fit(Reader(), data, ckpt_path="reader.ckpt", weights_only=True)
    assert resumed.global_step == 4 * EPOCH


# ---- Odd models and data


@pytest.mark.filterwarnings("ignore")  # LightningCLI warns of a default that it can't write down
@pytest.mark.parametrize("typed", [
    "--data foreign_project.data.Rooted --data.root here --model foreign_project.models.Pooled --model.pool MEAN",
    "--data foreign_project.data.Fewer --model foreign_project.models.Deep",
    *(f"--data running.Few --model foreign_project.models.{model}" for model in (
        "Late", "Lazy", "Counting", "Partly", "WithExtra"
    )),
    "--data foreign_project.data.Fewer --model ResNet18 --model.weights none --model.image_size 28",
    "--data foreign_project.data.Odd --data.kind stream",
])  # fmt: skip
def test_trained_model_is_tested_and_resumed(typed: str) -> None:
    fitted = command(f"fit {typed} {QUIET}")
    tested = command("test --ckpt_path best --pictures false")
    assert fitted.partition("Test accuracy")[2][:8] == tested.partition("Test accuracy")[2][:8] != ""
    before = steps()
    command("fit --ckpt_path last --trainer.max_epochs 2 --pictures false")
    assert steps() == 2 * before


def test_subclass_that_hands_its_arguments_on_is_loaded_from_python(quiet: Callable) -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(Deep(dropout=0.2, num_classes=11), Few())
    trainer.save_checkpoint("deep.ckpt")
    again = load_model("deep.ckpt")
    assert (type(again), again.num_classes) == (Deep, 11)
    assert Deep.load_from_checkpoint("deep.ckpt", weights_only=True).hparams["dropout"] == 0.2


# ---- In processes of their own


@pytest.mark.slow
def test_killed_in_mid_epoch_it_goes_on_and_takes_the_steps_that_are_left() -> None:
    save = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename=last"
    every = "--trainer.callbacks.every_n_train_steps=3 --trainer.callbacks.enable_version_counter=false"
    fault = {"FAULT": f"on_train_batch_end {EPOCH + 8} SIGKILL"}
    killed = process(*f"fit {READER} --trainer.callbacks+=faults.Fault {save} {every}".split(), **fault)
    assert killed.returncode == -9, killed.stderr
    assert steps() == EPOCH + 7  # 27, a multiple of 3
    ended = process("fit", "--ckpt_path", "last")
    assert ended.returncode == 0, ended.stderr
    assert steps() == 3 * EPOCH
    assert accuracy(ended.stdout) == accuracy(process("test", "--ckpt_path", "best").stdout)


@pytest.mark.slow
def test_two_processes_share_the_images_and_onecycle_ends_with_the_fit() -> None:
    schedule = "--model.scheduler OneCycleLR --model.scheduler.max_lr 0.01"
    ddp = "--trainer.strategy ddp --trainer.accelerator cpu --trainer.devices 2"
    ended = process("fit", *f"{READER} {schedule} {ddp}".split())
    assert ended.returncode == 0, ended.stderr
    last = loaded(checkpoint("last"))
    (state,) = last["lr_schedulers"]
    assert last["global_step"] == state["total_steps"] == state["last_epoch"] == 3 * EPOCH // 2
    assert "a part of" not in ended.stdout


# ---- docs/make-it-yours.md


@pytest.fixture
def page(idx_packed: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's text; its Python is mine.py here, and the clothes' files are small ones."""
    text = (ROOT / "docs" / "make-it-yours.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    Path("mine.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("fashion-mnist").mkdir()
    for name, content in idx_packed.items():
        Path("fashion-mnist", name).write_bytes(content)
    return text


@pytest.mark.slow  # that they are accepted is in docs/test_docs.py
def test_commands_of_the_page_run_with_its_python(page: str) -> None:
    short = "--pictures false --trainer.max_epochs 1 --trainer.limit_train_batches 2"
    for line in re.findall(r"^python -m mnist_lightning (fit .*--data mine.*|test .*|export .*)$", page, flags=re.M):
        typed = line.replace("/usr/share/datasets/fashion-mnist", "fashion-mnist --data.val_size 100")
        command(f"{typed} {short}" if line.startswith("fit") else typed)
    assert {path.name for path in Path("lightning_logs").iterdir()} == {"ConvNet", "MLP"}
    assert loaded(checkpoint("best", "ConvNet"))["class_names"][9] == "Boot"
    assert Path("model.pt2").is_file()


@pytest.mark.slow
def test_what_the_pages_table_adds_or_turns_off_is_accepted(page: str) -> None:
    table = page.split("## Add to a run")[1].split("\n\n")[1]
    options = re.findall("`(--[^`]*)`", table)
    assert len(options) > 10
    for typed in options:
        model = "--model ResNet18 --model.weights none --model.image_size 28" if "--model." in typed else ""
        printed = command(f"fit --data.source digits {model} {typed} {QUIET} --trainer.limit_train_batches 2")
        assert "Test accuracy" in printed, typed
