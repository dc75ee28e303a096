"""What is refused: exit code 2, three lines that say what was expected, what was got and what to do, and nothing left.

One table, by what lies in the folder beside files of the wrong kind: the words typed, and the three lines. "…" stands
for anything; where the third line is left out, it is where to look the options up.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from PIL import Image
from running import READER, refusal

from mnist_lightning.commands.refusals import nulls
from mnist_lightning.convnet import ConvNet

FILES = {
    "broken.yaml": b"model: [ConvNet\n}{",
    "list.yaml": b"- model\n- data\n",
    "binary.yaml": bytes(range(256)),
    "only_fit.yaml": b"fit:\n",
    "key.yaml": b"modell: ConvNet\n",
    "data_key.yaml": b"data:\n  batchsize: 3\n",
    "class.yaml": b"model: ConvNt\n",
    "init_args.yaml": b"model:\n  class_path: ConvNet\n  init_args: 3\n",
    "range.yaml": b"data:\n  class_path: MNISTDataModule\n  init_args:\n    batch_size: 0\n",
    "model_list.yaml": b"model: [1, 2]\n",
    "model_number.yaml": b"model: 5\n",
    "model_null.yaml": b"model: null\n",
    "trainer_number.yaml": b"trainer: 5\n",
    "text.ckpt": b"not a checkpoint",
}


def checkpoint(**changes: Any) -> dict[str, Any]:
    """A checkpoint of ConvNet in its smallest form; a change to None leaves that part out."""
    content = {
        "state_dict": ConvNet().state_dict(),
        "class_path": "mnist_lightning.convnet.ConvNet",
        "hyper_parameters": {},
        "datamodule_hyper_parameters": {"source": "digits"},
        "pytorch-lightning_version": "2.6.0",
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of the wrong kind, by the names that the table below uses."""
    folder = tmp_path_factory.mktemp("samples")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("folder", ".hidden", "there", "8", "ab"):
        (folder / name).mkdir()
    for name in ("a", "b"):
        (folder / "ab" / name).mkdir()
        Image.new("RGB", (60, 60)).save(folder / "ab" / name / "1.png")
    Image.new("L", (60, 60), 255).save(folder / "a.png")
    contents = {
        "whole.ckpt": checkpoint(),
        "other.ckpt": {"a": 1},
        "wrong_shape.ckpt": checkpoint(state_dict={**ConvNet().state_dict(), "fc2.bias": torch.zeros(11)}),
        "missing_layer.ckpt": checkpoint(state_dict={"conv1.weight": torch.zeros(32, 1, 3, 3)}),
        "no_state.ckpt": checkpoint(state_dict=None),
        "hyper_unknown.ckpt": checkpoint(hyper_parameters={"dropout": 0.5}),
        "data_range.ckpt": checkpoint(datamodule_hyper_parameters={"batch_size": -3}),
        "class_gone.ckpt": checkpoint(class_path="mnist_lightning.gone.Net"),
        "class_foreign.ckpt": checkpoint(class_path="torch.nn.Linear"),
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    whole = (folder / "whole.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_samples(samples: Path, folder: Path) -> None:
    for path in samples.iterdir():
        (folder / path.name).symlink_to(path)


LOOK_UP = "python -m mnist_lightning fit --help lists the options, fit --model.help ConvNet those of a model."
NO_OPTION = "an option that exists here"
DIGITS = "fit --pictures false --data.source digits"
FEW = "fit --pictures false --data running.Few --trainer.max_epochs 1"
ODD = "fit --pictures false --data foreign_project.data.Odd --data.kind"
WEIGHTS = "ResNet18's weights in torchvision's names, or a checkpoint of this project"
OURS, UNFIT = "a checkpoint of this project", "a checkpoint that fits the model as it is built now"
OTHER_FILE = "give --ckpt_path best, last or another file."
NO_RUN = "with a checkpoint under lightning_logs | none | train one with `fit`, or name the file: --ckpt_path FILE."
RESUME = "fit --ckpt_path last --trainer.max_epochs 3"
KEPT = "leave it out; to train with another value start a new run, without --ckpt_path."
PHOTOS = "predict --ckpt_path best --data Photos --data.path"
METRIC = "name another: --monitor METRIC (with --monitor_mode min where lower is better), or the callback's."

REFUSED: dict[str, dict[str, str]] = {
    "": {
        # Misspelt, with a did-you-mean
        "fit --model ConvNt": "a class for --model: ConvNet, ResNet18 | ConvNt | did you mean ConvNet?",
        "fit --model=ResNet": "a class for --model: ConvNet, ResNet18 | ResNet | did you mean ResNet18?",
        "fit --data MNISTDatamodule": "a class for --data: …Photos | MNISTDatamodule | did you mean MNISTDataModule?",
        "fit --modle ConvNet": f"{NO_OPTION} | --modle | did you mean --model?",
        "fit --data.batchsize 3": f"{NO_OPTION} | --data.batchsize | did you mean --data.batch_size?",
        "fit --model ResNet18 --model.image_siz 64":
            f"{NO_OPTION} | --model.image_siz | did you mean --model.image_size?",
        "fit --model.optimizer AdamWW": "a class for --model.optimizer, by its name | AdamWW | did you mean AdamW?",
        "fit --trainer.accumulate_grad_batches=-1":
            "--trainer.accumulate_grad_batches above 0 | -1 | give a larger number, or leave it out.",
        "fit --trainer.val_check_interval 0": "--trainer.val_check_interval above 0 | 0 | give a larger number, or …",
        "fit --trainer.num_sanity_val_steps=-7": "--trainer.num_sanity_val_steps of -1 and more | -7 | give …",
        "fit --model.optimizer AdamW --model.optimizer.lrr 1": f"{NO_OPTION} | --model.optimizer.lrr | did you mean …",
        "fit --model.scheduler OneCycle":
            "a class for --model.scheduler, by its name | OneCycle | did you mean OneCycleLR?",
        "fitt": "one of fit, validate, test, predict… | fitt | did you mean fit?",
        "": "a command: fit, validate, test, predict, …export, demo | none | for example: … fit --model ConvNet",
        "export --ckpt_path best --outptu model.pt2": f"{NO_OPTION} | --outptu | did you mean --output?",
        # Right, in the wrong place
        "fit --model.image_size 64":
            f"{NO_OPTION} | --model.image_size | it belongs to ResNet18: add --model ResNet18.",
        "fit --model ConvNet --model.weights none": f"{NO_OPTION} | --model.weights | it belongs to ResNet18…",
        "fit surplus": f"{NO_OPTION} | surplus",
        # Abbreviated
        "fit --trainer.max_epoch=3": f"{NO_OPTION} | --trainer.max_epoch | did you mean --trainer.max_epochs?",
        "fit --mod ConvNet": f"{NO_OPTION} | --mod | did you mean --model?",
        "fit --trainer.max_epoch 3 --trainer.default_root_dir ./here":
            f"{NO_OPTION} | --trainer.max_epoch | did you mean --trainer.max_epochs?",
        # No value
        "fit --data.batch_size": "a value after --data.batch_size | nothing",
        "fit --config": "a value after --config | nothing",
        "fit --model": "a value after --model | nothing",
        "test --ckpt_path":
            "a value after --ckpt_path | nothing | … test --help lists the options, test --model.help ConvNet …",
        "fit --model.optimizer null": "a value for --model.optimizer | null | leave it out to have the default.",
        "fit --data.val_size null": "a value for --data.val_size | null | leave it out to have the default.",
        "export --ckpt_path best": "--output | nothing | python -m mnist_lightning export --help lists the options.",
        # A class of one's own, or one whose package isn't there
        "fit --model foreign_project.models.Deep --model.dropuot 4":
            f"{NO_OPTION} | --model.dropuot | did you mean --model.dropout?",
        "fit --model foreign_project.models.Deep --model.dropout wide": "--model.dropout to be a number | wide",
        f"fit {READER} --data.bach_size 3": f"{NO_OPTION} | --data.bach_size | did you mean --data.batch_size?",
        "fit --model foreign_project.models.Raeder":
            "a valid --model | foreign_project.models.Raeder: module …has no attribute 'Raeder'",
        "fit --model foreign_project.extras.Diary":
            "a valid --model | foreign_project.extras.Diary: …not correspond to a subclass of LightningModule",
        "fit --model nowhere.Net": "a valid --model | nowhere.Net: No module named 'nowhere'",
        "fit --trainer.callbacks nowhere.Watch":
            "a valid --trainer.callbacks | nowhere.Watch: No module named 'nowhere'",
        f"{DIGITS} --trainer.logger WandbLogger": "settings that fit together | …wandb…not met…",
        f"{DIGITS} --trainer.callbacks foreign_project.extras.Rich":
            "settings that fit together | RichProgressBar requires rich",
        # Wrong type or range
        "fit --data.batch_size 0": "--data.batch_size to be a number >0 | 0",
        "fit --data.batch_size many": "--data.batch_size to be a whole number | many",
        f"{DIGITS} --data.val_size -1": "a val_size from 0 to 1436 images | -1 | give --data.val_size 0.1, a tenth.",
        "fit --data.val_size 1.5": "--data.val_size to be a whole number or a number >0 and <1 | 1.5",
        f"{DIGITS} --data.val_size 60000":
            "a val_size from 0 to 1436 images | 1437 | give --data.val_size 0.1, a tenth.",
        "fit --data.source cifar": "--data.source to be one of auto, mnist, digits | cifar",
        "fit --data.mirrors http://127.0.0.1:1": "--data.mirrors to be …list… | http://127.0.0.1:1",
        "fit --model ResNet18 --model.image_size 8": "--model.image_size to be a number >=28 and <=512 | 8",
        "fit --model.optimizer AdamW --model.optimizer.lr fast": "--model.optimizer.lr to be a number | fast",
        f"{DIGITS} --model.optimizer.lr -1": "settings that fit together | Invalid learning rate: -1.0",
        "fit --model.scheduler StepLR":
            "step_size beside --model.scheduler | nothing | add --model.scheduler.step_size VALUE.",
        "fit --trainer.callbacks LearningRateMonitor --trainer.callbacks.logging_interval hour":
            "--trainer.callbacks.logging_interval to be one of step, epoch | hour",
        f"{DIGITS} --lr_find true --trainer.max_steps 5":
            "lr_find alone | --trainer.max_steps 5 as well | leave one out.",
        "test --ckpt_path whole.ckpt --trainer.barebones true":
            "metrics to test with | --trainer.barebones true, which logs none | leave it out.",
        "fit --trainer.max_epochs ten": "--trainer.max_epochs to be a whole number | ten",
        f"{DIGITS} --trainer.max_epochs -5": "settings that fit together | …max_epochs…-5…",
        f"{DIGITS} --trainer.val_check_interval 1000": "settings that fit together | …val_check_interval…1000…",
        "fit --seed_everything x": "--seed_everything to be …a whole number | x",
        "fit --seed_everything -5": "settings that fit together | -5 …",
        "export --ckpt_path best --output model.h5": "--output to end in .onnx, .pt2, .safetensors | model.h5 | …",
        "export --ckpt_path best --output http://x/model.pt2": "--output on this machine | http://x/model.pt2 | …",
        # Nothing to measure, and what doesn't go together
        f"{DIGITS} --trainer.max_epochs -1 --model.scheduler OneCycleLR --model.scheduler.max_lr 1":
            "a fit of known length for this schedule | none | "
            "give --trainer.max_epochs, or --trainer.max_steps where the data is a stream.",
        f"{ODD} stream --model.scheduler OneCycleLR --model.scheduler.max_lr 0.1 --trainer.max_epochs 1":
            "a fit of known length for this schedule | none | …where the data is a stream.",
        f"{DIGITS} --data.val_size 0 --model.scheduler ReduceLROnPlateau --model.scheduler.monitor val/loss":
            "a metric that is measured | val/loss, without any validation | name one of training.",
        f"{DIGITS} --data.val_size 0 --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss":
            "a metric that is measured | val/loss, without any validation | name one of training.",
        f"{FEW} --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/nothing":
            f"a metric to monitor | val/nothing; the model logs …val/acc, val/loss | {METRIC}",
        f"{FEW} --monitor val/f1": f"a metric to monitor | val/f1; the model logs …val/acc, val/loss | {METRIC}",
        f"{ODD} one-hot": "class numbers as labels, int64 (B,) | float32 (8, 10) from Odd | convert them, …",
        f"{ODD} int32": "class numbers as labels, int64 (B,) | int32 (8,) from Odd | convert them, or override …_step.",
        f"{ODD} three": "batches that are pairs (images, labels) | a list of 3 from Odd | return pairs, …",
        f"{ODD} dict": "batches that are pairs (images, labels) | a dict of 2 from Odd | return pairs, or …_step.",
        "fit --data Photos --data.path a.png": "images with labels to fit | Photos, which have none | use Photos …",
        "test --ckpt_path whole.ckpt --data Photos --data.path a.png":
            "images with labels to test | Photos, which have none | use Photos with predict; …",
        # Config files
        "fit --config nowhere.yaml": "a valid --config | File does not exist: …nowhere.yaml…",
        "fit --config ./x.yaml --trainer.max_epoch 3": "a valid --config | File does not exist: …x.yaml…",
        "fit --config folder": "a valid --config | Path is not a file: …folder…",
        "fit --config broken.yaml": "a valid command line or config file | …line 1…",
        "fit --config list.yaml": "a valid command line or config file | Unexpected config: - model - data",
        "fit --config only_fit.yaml": "a valid command line or config file | Unexpected config: fit:",
        "fit --config binary.yaml": "a valid command line or config file | …can't decode byte 0x80…",
        "fit --config key.yaml": f"{NO_OPTION} | --modell | did you mean --model?",
        "fit --config data_key.yaml": f"{NO_OPTION} | --data.batchsize | did you mean --data.batch_size?",
        "fit --config class.yaml": "a class for --model: ConvNet, ResNet18 | ConvNt | did you mean ConvNet?",
        "fit --config init_args.yaml": "a valid --model | …'init_args': 3…no attribute…",
        "fit --config range.yaml": "--data.batch_size to be a number >0 | …0",
        "fit --config model_list.yaml": "a valid --model | [1, 2]: Not a valid subclass of LightningModule",
        "fit --config model_number.yaml": "a valid --model | 5: Not a valid subclass of LightningModule",
        "fit --config model_null.yaml": "--model | nothing",
        "fit --config trainer_number.yaml":
            "settings below trainer: in trainer_number.yaml | 5 | for example max_epochs: 3.",
        # Checkpoints
        "test": "a checkpoint to test | none | add --ckpt_path FILE, or best or last for the newest run.",
        "test --ckpt_path=": "a checkpoint to test | none | add --ckpt_path FILE, …",
        "test --ckpt_path best": f"a run of a model {NO_RUN}",
        "test --ckpt_path last --model ResNet18": f"a run of ResNet18 {NO_RUN}",
        "fit --ckpt_path last": f"a run of a model {NO_RUN}",
        "test --ckpt_path nowhere.ckpt": f"{OURS} | no such file: nowhere.ckpt | {OTHER_FILE}",
        "test --ckpt_path folder": f"{OURS} | a folder: folder | {OTHER_FILE}",
        "test --ckpt_path text.ckpt": f"{OURS} | text.ckpt, which is damaged or something else | {OTHER_FILE}",
        "test --ckpt_path truncated.ckpt": f"{OURS} | truncated.ckpt, which is damaged …else | {OTHER_FILE}",
        "test --ckpt_path other.ckpt": f"{OURS} | other.ckpt, which is something else | {OTHER_FILE}",
        "test --ckpt_path no_state.ckpt": f"{OURS} | no_state.ckpt, which is something else | {OTHER_FILE}",
        "test --ckpt_path whole.ckpt --model ResNet18":
            "a checkpoint of …ResNet18 | one of …ConvNet | leave out --model, or change it.",
        "fit --ckpt_path whole.ckpt":
            "a checkpoint to go on from | whole.ckpt, which holds the weights alone | start a new run, without …",
        "test --ckpt_path wrong_shape.ckpt":
            f"{UNFIT} | wrong_shape.ckpt, ConvNet: size mismatch for fc2.bias… | … leave out --model options.",
        "test --ckpt_path missing_layer.ckpt":
            f'{UNFIT} | missing_layer.ckpt, ConvNet: Missing key(s) in state_dict: "conv1.bias", … | …',
        "test --ckpt_path hyper_unknown.ckpt": f"{NO_OPTION} | --model.dropout | …",
        "test --ckpt_path data_range.ckpt":
            "--data.batch_size to be a number >0 | …-3 | … test --help lists the options, …",
        "test --ckpt_path class_gone.ckpt":
            "a checkpoint of classes that exist here, as they were | mnist_lightning.gone.Net… | install …",
        "test --ckpt_path class_foreign.ckpt": "… | …torch.nn.…Linear… | …",
        # Weights
        f"{DIGITS} --model ResNet18 --model.weights nowhere.pth":
            f"{WEIGHTS} | no such file: nowhere.pth | give --model.weights another file, imagenet or none.",
        f"{DIGITS} --model ResNet18 --model.weights text.ckpt":
            f"{WEIGHTS} | text.ckpt, which is damaged or something else | give --model.weights another file, …",
        # Folders that can't be used
        "fit --data.source mnist --data.data_dir text.ckpt":
            "a folder to read and write: text.ckpt/MNIST/raw | …Not a directory… | put …",
        f"{DIGITS} --trainer.default_root_dir text.ckpt":
            "a folder for runs | …text.ckpt… | …",
    },
    "pictures": {
        f"{RESUME} --data.batch_size 8": f"--data.batch_size as in the checkpoint: 16 | 8 | {KEPT}",
    },
    "convnet": {
        "test --ckpt_path best --data ImageFolder --data.path ab --data.test_size 1":
            "classes that the model knows: 0, 1, 2, … | a, b in ImageFolder | give data of those.",
        f"{RESUME} --data.source mnist": f"--data.source as in the checkpoint: digits | mnist | {KEPT}",
        f"{RESUME} --data.batch_size 32": f"--data.batch_size as in the checkpoint: 64 | 32 | {KEPT}",
        f"{RESUME} --data.val_size 10": f"--data.val_size as in the checkpoint: 5000 | 10 | {KEPT}",
        f"{RESUME} --data.split_seed 4": f"--data.split_seed as in the checkpoint: 0 | 4 | {KEPT}",
        f"{RESUME} --model.optimizer.lr 0.5": f"--model.optimizer as in the checkpoint: … | …0.5… | {KEPT}",
        f"{RESUME} --seed_everything 4": "--seed_everything as in the run: 0 | 4 | leave it out.",
        f"{RESUME} --model mnist_lightning.ResNet18": f"a run of ResNet18 {NO_RUN}",
        f"{RESUME} --trainer.callbacks BatchSizeFinder":
            "a run to go on with | BatchSizeFinder, which would begin it anew | start a new run with what it found…",
        f"{PHOTOS}=": "a picture or a folder of them at --data.path | no path | …",
        f"{PHOTOS} nowhere": "a picture or a folder of them at --data.path | nothing: nowhere | …",
        f"{PHOTOS} .hidden": "pictures at --data.path | an empty folder: .hidden | …",
        f"{PHOTOS} a.png --data.save_seen a.png": "… | a.png, which exists and is something else | …",
        f"{PHOTOS} a.png --data.save_seen b.jpg": "a .png for --data.save_seen | b.jpg | …",
    },
    "resnet": {
        "test --ckpt_path best --model.weights none":
            f"--model.weights as in the checkpoint: …weights.pth | none | {KEPT}",
    },
    "letters": {
        f"fit {READER} --model.num_classes 25":
            "labels from 0 to 24 | …from Letters | give --model.num_classes, or mend the labels.",
        f"fit {READER.replace('foreign_project.models.Reader', 'ConvNet')} --model.num_classes 26":
            "uint8 images (B, 1, 28, 28), 0 to 255 | float32 (8, 3, 40, 40), in [0…, 1] | give …",
        f"fit {READER} --monitor val/f2":
            f"a metric to monitor | val/f2; the model logs …val/acc, val/f1, val/loss | {METRIC}",
        f"fit {READER.replace('Reader', 'Plain')}":
            f"a metric to monitor | val/acc; the model logs val/loss | {METRIC}",
    },
    "reader": {
        f"{PHOTOS} letters/test":
            "a model of uint8 images (B, 1, 28, 28) for Photos | one of float32 (B, 3, 40, 40) | give …",
    },
}  # fmt: skip
ROWS = [(beside, typed) for beside, rows in REFUSED.items() for typed in rows]
if importlib.util.find_spec("wandb") is not None:
    ROWS = [row for row in ROWS if "Wandb" not in row[1]]


def assert_lines(lines: list[str], wanted: str) -> None:
    expected, got, remedy = (*wanted.split(" | "), LOOK_UP)[:3]
    for line, pattern in zip(lines, (f"expected {expected}", f"got {got}", remedy), strict=True):
        assert re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), line), line


@pytest.mark.filterwarnings("ignore")  # Lightning's, of odd models
@pytest.mark.parametrize(("beside", "typed"), ROWS)
def test_bad_input_is_explained_and_leaves_nothing(beside: str, typed: str, request: pytest.FixtureRequest) -> None:
    if beside:
        request.getfixturevalue(beside)
    assert_lines(refusal(*typed.split()), REFUSED[beside][typed])


# ---- What needs more than a command line


class Loose(LightningModule):
    def __init__(
        self, width: int = 4, lr: float = None, depth: Any = 3, steps: int | None = 5  # type: ignore[assignment]
    ) -> None:
        super().__init__()


def test_null_is_refused_where_an_argument_needs_a_value_and_only_there() -> None:
    given = Namespace(class_path=f"{__name__}.Loose", init_args=dict.fromkeys(("width", "lr", "depth", "steps")))
    assert list(nulls(given)) == ["width"]


LOCKED = PermissionError(13, "Permission denied", "locked/x")
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("place", "error", "typed", "wanted"), [
    ("pathlib.Path.mkdir", LOCKED, "fit --data.source mnist --data.data_dir locked",
     "a folder to read and write: locked/MNIST/raw | …Permission denied: 'locked/x' | put … or give --data.data_dir …"),
    ("pathlib.Path.mkdir", LOCKED, "fit --data.source digits",
     "a folder for runs | Permission denied: locked/x | move it away, or …"),
    ("os.fsync", FULL, "fit --data.source digits", "… | No space left on device | choose another place, or mend it."),
    ("torch.load", LOCKED, "test --ckpt_path whole.ckpt",
     f"{OURS} | a file without read permission: whole.ckpt | {OTHER_FILE}"),
], ids=lambda value: None)  # fmt: skip
def test_refusal_of_the_system_is_explained(
    place: str, error: OSError, typed: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is played: whoever runs the tests as root may write everywhere."""
    monkeypatch.setattr(place, Mock(side_effect=error))
    assert_lines(refusal(*typed.split()), wanted)


@pytest.mark.parametrize(("name", "more"), [("export", ["--output", "model.onnx"]), ("demo", [])])
def test_missing_extra_is_named(name: str, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"pip install '.[{name}]'" in refusal(name, "--ckpt_path", "best", *more)[2]
