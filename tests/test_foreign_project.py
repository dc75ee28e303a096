"""A project that isn't MNIST, tests/foreign_project/, goes through every command; the page make-it-yours.md is run.

Its letters are RGB floats of 40×40 in 26 classes or 2, from a datamodule that knows nothing of this package.
"""

import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from string import ascii_uppercase

import pytest
import running
import torch
from foreign_project.data import Letters
from foreign_project.letters import write_letters
from foreign_project.models import Plain, Reader
from running import Fit, loaded, process, rows
from sklearn.metrics import f1_score

from mnist_lightning import load_model

ROOT = Path(__file__).parents[1]
READER = "--model foreign_project.models.Reader --data foreign_project.data.Letters --data.data_dir letters"
PLAIN = READER.replace("Reader", "Plain") + " --monitor val/loss --monitor_mode min --trainer.max_epochs 2"
QUIET = "--pictures false --trainer.max_epochs 1"
EPOCH = 20  # steps: 156 images, 8 a batch


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_letters(folder / "letters")
    write_letters(folder / "two", classes=2, train=40, test=10)
    return folder


@pytest.fixture(scope="session")
def reader_fit(drawn: Path) -> Fit:
    """Of Reader, for 3 epochs: the model's own default. It says so where it can't draw."""
    with redirect_stderr(io.StringIO()) as error:
        fitted = running.fit(drawn, *READER.split())
    return fitted._replace(out=fitted.out + error.getvalue())


@pytest.fixture(autouse=True)
def letters(drawn: Path, folder: Path) -> None:
    """The letters are in the current folder."""
    for name in ("letters", "two"):
        Path(name).symlink_to(drawn / name)


@pytest.fixture
def reader(reader_fit: Fit, letters: None) -> str:
    """A copy of that run in the current folder; what the fit printed."""
    shutil.copytree(reader_fit.root / "lightning_logs", "lightning_logs")
    return reader_fit.out


def command(typed: str) -> str:
    return running.command(*shlex.split(typed))


def accuracy(printed: str) -> float:
    return float(running.accuracy(printed))


def checkpoint(name: str, model: str = "Reader") -> Path:
    return Path("lightning_logs", model, "version_0", "checkpoints", f"{name}.ckpt")


def results(name: str, model: str = "Reader") -> Path:
    return Path("lightning_logs", model, "version_0", f"{name}.csv")


def logits_and_labels(path: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a checkpoint on a part of the letters, by a plain loop."""
    model, data = load_model(path), Letters("letters")
    data.setup("test")
    images, labels = zip(*getattr(data, f"{part}_set"), strict=True)
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(labels)


# From the command line


def test_commands_agree_about_26_classes_of_colour_images(reader: str) -> None:
    assert "Pictures: no" not in reader
    assert loaded(checkpoint("last"))["global_step"] == 3 * EPOCH
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


def test_two_classes_do_too() -> None:
    printed = command(f"fit {READER} --model.num_classes 2 --data.data_dir two")
    assert accuracy(printed) > 75  # 50 by chance
    command("predict --ckpt_path best")
    assert list(rows(results("predictions"))[0])[3:] == ["pA", "pB"]


def test_metric_of_ones_own_chooses_the_best_checkpoint() -> None:
    command(f"fit {READER} --monitor val/f1")
    measured = [float(row["val/f1"]) for row in rows(results("metrics")) if row["val/f1"]]
    logits, labels = logits_and_labels(checkpoint("best"), "val")
    seen = sorted(set(labels.tolist()) | set(logits.argmax(1).tolist()))
    f1 = f1_score(labels, logits.argmax(1), labels=seen, average="macro", zero_division=0.0)
    assert max(measured) == pytest.approx(f1, abs=1e-6)


def test_plain_lightning_module_is_trained_tested_and_resumed(quiet: Callable) -> None:
    printed = command(f"fit {PLAIN}")
    (loss,) = re.findall(r"test/loss (\S+)", printed)
    assert f"test/loss {loss}\n" in command("test --ckpt_path best")
    best = loaded(checkpoint("best", "Plain"))
    model = Plain()
    model.load_state_dict(best["state_dict"])
    (again,) = quiet().test(model, Letters("letters"), verbose=False)
    assert f"{again['test/loss']:.4f}" == loss
    command("predict --ckpt_path best")
    assert list(rows(results("predictions", "Plain"))[0])[2:4] == ["output A", "output B"]
    command("fit --ckpt_path last --trainer.max_epochs 3")
    assert loaded(checkpoint("last", "Plain"))["global_step"] == 3 * EPOCH


def test_images_without_labels_and_classes_without_names_are_predicted() -> None:
    command(f"fit {READER.replace('Letters', 'Nameless')} {QUIET}")
    command("predict --ckpt_path best")
    predictions = rows(results("predictions"))
    assert len(predictions) == 52
    assert list(predictions[0]) == ["index", "predicted", *(f"p{label}" for label in range(26))]


def test_callback_and_logger_of_ones_own_run_beside_the_projects() -> None:
    own = "--trainer.callbacks+=foreign_project.extras.Diary --trainer.logger+=foreign_project.extras.Table"
    command(f"fit {READER} {own} --trainer.max_epochs 2")
    assert Path("diary.txt").read_text().split() == ["0", str(EPOCH), "1", str(2 * EPOCH)]
    assert [row["val/f1"] for row in rows(Path("tables", "metrics.csv")) if row.get("val/f1")]
    assert results("metrics").is_file()


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported_file_answers_as_the_checkpoint(suffix: str, reader: str) -> None:
    if suffix == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    printed = command(f"export --ckpt_path best --output reader.{suffix}")
    assert "1,000 of 1,000 images" in printed
    if suffix == "pt2":
        logits, _ = logits_and_labels(checkpoint("best"), "test")
        data = Letters("letters")
        data.setup("test")
        images = torch.stack([image for image, _ in data.test_set])
        torch.testing.assert_close(torch.export.load("reader.pt2").module()(images), logits)


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


@pytest.mark.parametrize(("typed", "said"), [
    (f"{READER} --model.num_classes 25", ["expected labels from 0 to 24", "from Letters", "--model.num_classes"]),
    (READER.replace("foreign_project.models.Reader", "ConvNet"), ["expected uint8", "got float32", "from Letters"]),
    (f"{READER} --monitor val/f2", ["got val/f2", "val/acc, val/f1, val/loss"]),
    (PLAIN.replace("--monitor val/loss", ""), ["got val/acc", "val/loss"]),
    (f"{READER} --data.bach_size 3", ["did you mean --data.batch_size?"]),
    ("--model foreign_project.models.Raeder", ["foreign_project.models.Raeder", "no attribute"]),
    ("--model foreign_project.extras.Diary", ["foreign_project.extras.Diary", "subclass of LightningModule"]),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_words(typed: str, said: list[str]) -> None:
    message = running.refused("fit", *typed.split())
    for part in said:
        assert part in message


def test_photos_are_refused_for_a_model_of_other_images(reader: str) -> None:
    typed = ("predict", "--ckpt_path", "best", "--data", "Photos", "--data.path", "letters/test")
    assert "for Photos got one of float32" in running.refused(*typed)


def test_fit_resumed_at_an_epochs_end_is_the_undisturbed_one(reader_fit: Fit) -> None:
    command(f"fit {READER} --pictures false --trainer.max_epochs 1")
    torch.randn(3)  # somebody else draws
    command("fit --ckpt_path last --trainer.max_epochs 3")
    whole, parts = (loaded(root / checkpoint("last")) for root in (reader_fit.root, Path()))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name


# From Python


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


# In processes of their own


@pytest.mark.slow
def test_killed_in_mid_epoch_it_goes_on_and_takes_the_steps_that_are_left() -> None:
    save = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename=last"
    every = "--trainer.callbacks.every_n_train_steps=3 --trainer.callbacks.enable_version_counter=false"
    fault = {"FAULT": f"on_train_batch_end {EPOCH + 8} SIGKILL"}
    killed = process(*f"fit {READER} --trainer.callbacks+=faults.Fault {save} {every}".split(), **fault)
    assert killed.returncode == -9, killed.stderr
    assert loaded(checkpoint("last"))["global_step"] == EPOCH + 7  # 27, a multiple of 3
    ended = process("fit", "--ckpt_path", "last")
    assert ended.returncode == 0, ended.stderr
    assert loaded(checkpoint("last"))["global_step"] == 3 * EPOCH
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


# docs/make-it-yours.md


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


def test_commands_of_the_page_run_with_its_python(page: str) -> None:
    short = "--trainer.max_epochs 1 --trainer.limit_train_batches 2"
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
