"""The promises of docs/reliability.md: real processes are killed, interrupted and starved; real files are damaged.

A quick part runs by default. `python -m pytest -m reliability` runs all of it and prints how many times each fault was
tried. Processes are real ones, forked from a server that has imported torch (it saves seconds each); those of
several ranks are started as a user starts them.
"""

import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faults
import pytest
import torch
from running import plain

import mnist_lightning
from mnist_lightning.errors import UserError
from mnist_lightning.finetuning import features
from mnist_lightning.resnet import ResNet18
from mnist_lightning.runs.checkpoints import WholeCheckpointIO
from mnist_lightning.runs.logger import read_metrics
from mnist_lightning.runs.saved import Saved

pytestmark = pytest.mark.reliability
slow = pytest.mark.slow  # only with -m reliability

BOUND = 300  # seconds until a process counts as hung; none comes near
EPOCH = 10  # training steps; a fit has two epochs, and saves `last` after each third step beside what fit always saves
STEPS = 2 * EPOCH
FIT = f"""fit --data.source digits --seed_everything 3 --trainer.max_epochs 2 --trainer.limit_train_batches {EPOCH}
    --trainer.accelerator cpu --pictures false --trainer.callbacks+=faults.Fault --trainer.callbacks+=ModelCheckpoint
    --trainer.callbacks.filename=last --trainer.callbacks.every_n_train_steps=3
    --trainer.callbacks.enable_version_counter=false""".split()
RESNET = "--model ResNet18 --model.weights none --model.image_size 28"
ONE_CYCLE = "--model.scheduler OneCycleLR --model.scheduler.max_lr 0.1"
RECIPES = {
    "ConvNet": f"--model ConvNet {ONE_CYCLE} --data.augment 1",
    "a model with dropout": "--model faults.WithDropout --data.augment 1",
    "ResNet18 on kept features": f"{RESNET} {ONE_CYCLE}",
    "ResNet18": f"{RESNET} {ONE_CYCLE} --model.cache_features false",
    "ResNet18 unfrozen gradually": f"{RESNET} {ONE_CYCLE} --model.trainable_layers 2 "
    "--trainer.callbacks+=GradualUnfreezing --trainer.callbacks.layers=[0,2]",
    "ConvNet by epochs": "--model ConvNet --model.scheduler StepLR --model.scheduler.step_size 1 "
    "--model.optimizer Adam --model.optimizer.lr 1e-3 --pictures true",
}

Tried = Callable[[str], None]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """As the package reads it."""
    return Saved(path).content


class Ended(NamedTuple):
    code: int  # -9 after SIGKILL, as in subprocess
    output: str


class Process:
    """`python -m mnist_lightning ARGS` in `folder`, started."""

    server = multiprocessing.get_context("forkserver")
    numbers = itertools.count()

    def __init__(self, folder: Path, *args: str, fault: str = "") -> None:
        self.server.set_forkserver_preload(["mnist_lightning.commands.cli"])
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output{next(self.numbers)}"
        environment = {"XDG_CACHE_HOME": str(folder / "cache")} | ({"FAULT": fault} if fault else {})
        self.process = self.server.Process(target=faults.command, args=(folder, self.output, environment, list(args)))
        self.process.start()

    def ended(self) -> Ended:
        self.process.join(BOUND)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"hangs: {self.output.read_text()}")
        return Ended(self.process.exitcode, self.output.read_text())


def run(folder: Path, *args: str, fault: str = "") -> Ended:
    return Process(folder, *args, fault=fault).ended()


def fit(folder: Path, recipe: str = "ConvNet", fault: str = "") -> Ended:
    return run(folder, *FIT, *RECIPES[recipe].split(), fault=fault)


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("lightning_logs/*/version_*"))


def last(folder: Path) -> Path:
    """The last checkpoint of the only run."""
    (run,) = runs(folder)
    return run / "checkpoints" / "last.ckpt"


TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


def assert_same_training(a: Path, b: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (read_checkpoint(path.with_name(name)) for path in (a, b))
        for part in TRAINED:
            assert plain(one[part]) == plain(other[part]), (name, part)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """By recipe: the folder of a fit that nothing disturbed, and its test accuracy."""
    known: dict[str, tuple[Path, str]] = {}

    def fitted(recipe: str) -> tuple[Path, str]:
        if recipe not in known:
            folder = tmp_path_factory.mktemp("whole")
            ended = fit(folder, recipe)
            assert ended.code == 0, ended.output
            assert read_checkpoint(last(folder))["global_step"] == STEPS
            known[recipe] = folder, accuracy(ended)
        return known[recipe]

    return fitted


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Tried:
    """Counts for the table: called with the fault, after it was survived."""
    return lambda fault: record_property("tried", fault)


def accuracy(ended: Ended) -> str:
    return re.search(r"^Test accuracy .*$", ended.output, re.M)[0]


def resume(folder: Path, recipe: str, whole: Callable[[str], tuple[Path, str]]) -> None:
    """Goes on in the run that is there, and has to end as if nothing had happened."""
    before = runs(folder)
    undisturbed, expected = whole(recipe)
    ended = run(folder, "fit", "--ckpt_path", "last")
    assert ended.code == 0, ended.output
    assert accuracy(ended) == expected
    assert runs(folder) == before
    assert_same_training(last(folder), last(undisturbed))


# ---- Killed at any moment


# The first validation is the check before training, of one batch.
KILLED = [
    *(("ConvNet", f"on_train_batch_start {step + 1}") for step in range(3, STEPS)),
    *(("a model with dropout", f"on_train_batch_start {step + 1}") for step in range(4, STEPS, 2)),
    *(("ResNet18 on kept features", f"on_train_batch_start {step + 1}") for step in range(3, STEPS, 3)),
    *(("ResNet18", f"on_train_batch_start {step + 1}") for step in range(5, STEPS, 5)),
    *(("ResNet18 unfrozen gradually", f"on_train_batch_start {step + 1}") for step in (5, 10, 13, 15)),
    *(("ConvNet by epochs", f"on_train_batch_start {step + 1}") for step in range(4, STEPS, 4)),
    *(("ConvNet", f"{place} {step}") for step in (7, 13) for place in (
        "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad",
    )),
    *((recipe, fault) for recipe in RECIPES for fault in (
        "on_validation_start 2", "on_validation_batch_end 2", "on_validation_end 3", "on_train_epoch_end 1",
        "on_train_epoch_start 2", "on_train_end 1", "on_test_start 1",
    )),
    # config.yaml is written so, too, and each file has two fsyncs: the bytes, the name.
    *(("ConvNet", fault) for fault in (
        "save 3", "save 4", "save 6", "replace 4", "replace 5", "replace 7", "fsync 7", "fsync 9", "fsync 13",
    )),
]  # fmt: skip
QUICK = ("a model with dropout", "on_train_batch_start 15")
KILLED = [pytest.param(*kill, marks=() if kill == QUICK else slow) for kill in KILLED]


@pytest.mark.parametrize(("recipe", "fault"), KILLED)
def test_killed_and_resumed_is_the_undisturbed_run(
    recipe: str, fault: str, whole: Any, tmp_path: Path, tried: Tried
) -> None:
    assert fit(tmp_path, recipe, f"{fault} SIGKILL").code == -9
    read_checkpoint(last(tmp_path))
    resume(tmp_path, recipe, whole)
    if fault.startswith("on_train_batch_start"):
        kind = f"at a training step, {recipe}"
    elif fault.startswith(("on_before", "on_after")):
        kind = "in the middle of a training step"
    elif fault.startswith("on_"):
        kind = "in validation, between epochs, before the final test"
    else:
        kind = "while a checkpoint is written"
    tried(f"SIGKILL {kind}")


@slow
def test_killed_again_and_again_and_resumed_is_the_undisturbed_run(whole: Any, tmp_path: Path, tried: Tried) -> None:
    assert fit(tmp_path, fault="on_train_batch_end 5 SIGKILL").code == -9
    for _ in range(4):  # it goes 4 steps on, and up to 2 back
        assert run(tmp_path, "fit", "--ckpt_path", "last", fault="on_train_batch_end 5 SIGKILL").code == -9
    resume(tmp_path, "ConvNet", whole)
    tried("SIGKILL five times in one run")


@slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_same_command_and_seed_twice_is_the_same_to_the_last_bit(
    recipe: str, whole: Any, tmp_path: Path, tried: Tried
) -> None:
    undisturbed, expected = whole(recipe)
    assert accuracy(fit(tmp_path, recipe)) == expected
    assert_same_training(last(tmp_path), last(undisturbed))
    tried("The same command and seed again")


@slow
@pytest.mark.parametrize("fault", ["", "on_train_batch_end 2 SIGKILL"])
def test_last_without_a_checkpoint_is_an_error_and_no_fresh_start(fault: str, tmp_path: Path, tried: Tried) -> None:
    assert not fault or fit(tmp_path, fault=fault).code == -9
    before = runs(tmp_path)
    ended = run(tmp_path, "fit", "--ckpt_path", "last")
    assert (ended.code, runs(tmp_path)) == (2, before)
    assert "expected a run of a model with a checkpoint" in ended.output
    tried("--ckpt_path last without a run")


@slow
def test_seed_is_recorded_and_another_one_is_refused(whole: Any, tried: Tried) -> None:
    folder, _ = whole("ConvNet")
    assert "seed_everything: 3\n" in last(folder).parents[1].joinpath("config.yaml").read_text()
    before = last(folder).read_bytes()
    ended = run(folder, "fit", "--ckpt_path", "last", "--seed_everything", "4")
    assert ended.code == 2
    assert "expected --seed_everything as in the run: 3" in ended.output
    assert last(folder).read_bytes() == before
    tried("Another --seed_everything on resuming")


@slow
def test_two_fits_at_the_same_moment_get_a_folder_each(whole: Any, tmp_path: Path, tried: Tried) -> None:
    undisturbed, expected = whole("ConvNet")
    started = [Process(tmp_path, *FIT, *RECIPES["ConvNet"].split()) for _ in range(3)]
    for process in started:
        assert accuracy(process.ended()) == expected
    assert [path.name for path in runs(tmp_path)] == ["version_0", "version_1", "version_2"]
    for path in runs(tmp_path):
        assert_same_training(path / "checkpoints" / "last.ckpt", last(undisturbed))
        tried("Fits started at the same moment in the same folder")


# ---- Asked to stop


@pytest.mark.parametrize(("signals", "where", "step"), [
    pytest.param("SIGTERM", "on_train_batch_start 8", 8, id="SIGTERM", marks=slow),
    *(pytest.param(name, *place, marks=slow, id=f"{name} {place[0]}") for name in ("SIGTERM", "SIGINT") for place in (
        ("on_train_batch_start 14", 14), ("on_train_batch_start 1", 1), ("on_before_optimizer_step 5", 5),
        ("on_train_batch_end 4", 4), ("on_train_batch_end 10", 10), ("on_train_epoch_start 2", 10),
        ("on_validation_start 2", 10), ("on_validation_batch_end 2", 10), ("on_validation_end 2", 10),
        ("on_validation_start 3", 20),
    )),
    pytest.param("SIGTERM+SIGTERM", "on_train_batch_start 8", 8, marks=slow, id="SIGTERM twice"),
])  # fmt: skip
def test_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    signals: str, where: str, step: int, whole: Any, tmp_path: Path, tried: Tried
) -> None:
    ended = fit(tmp_path, fault=f"{where} {signals}")
    assert ended.code == {"SIGTERM": 143, "SIGINT": 130}[signals.split("+")[0]], ended.output
    assert "Traceback" not in ended.output
    said = re.search(r"Stopped after step (\d+)\. To go on: python -m mnist_lightning (fit .*)", ended.output)
    assert said and int(said[1]) == step == read_checkpoint(last(tmp_path))["global_step"]
    undisturbed, expected = whole("ConvNet")
    assert accuracy(run(tmp_path, *said[2].split())) == expected
    assert_same_training(last(tmp_path), last(undisturbed))
    tried(f"{signals.split('+')[0]} in {'validation' if 'validation' in where else 'training'}")


@slow
@pytest.mark.parametrize("where", ["on_train_batch_start 5", "on_validation_batch_end 2"])
def test_second_ctrl_c_ends_at_once(where: str, tmp_path: Path, tried: Tried) -> None:
    ended = fit(tmp_path, fault=f"{where} SIGINT+SIGINT")
    assert ended.code == 130
    assert "Stopped after" not in ended.output and "Traceback" not in ended.output
    read_checkpoint(last(tmp_path))  # of step 3 or so: the one before is whole
    tried("Ctrl-C twice")


@slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_in_the_final_test_is_an_exit_code(
    name: str, code: int, whole: Any, tmp_path: Path, tried: Tried
) -> None:
    ended = fit(tmp_path, fault=f"on_test_batch_start 1 {name}")
    assert abs(ended.code) in (code, code - 128), ended.output
    assert "Test accuracy" not in ended.output
    resume(tmp_path, "ConvNet", whole)
    tried(f"{name} in the final test")


# ---- What fails


@slow
@pytest.mark.parametrize("where", [
    "on_train_batch_end 8", "on_train_batch_start 2", "on_before_optimizer_step 13", "on_validation_batch_end 2",
    "on_train_epoch_end 2",
])  # fmt: skip
def test_exception_leaves_a_checkpoint_that_no_later_command_deletes(where: str, tmp_path: Path, tried: Tried) -> None:
    ended = fit(tmp_path, fault=f"{where} fail")
    assert ended.code == 1
    kept = last(tmp_path).with_name("exception.ckpt")
    assert f"RuntimeError: the state is kept in {kept.relative_to(tmp_path)}" in ended.output
    assert re.search(r'faults\.py", line \d+, in fail\n.*\nRuntimeError: the fault of this test\n$', ended.output)
    content = kept.read_bytes()
    again = [*FIT, *RECIPES["ConvNet"].split()]
    for args in (["fit", "--ckpt_path", str(kept)], ["test", "--ckpt_path", str(kept)], again):
        assert run(tmp_path, *args).code == 0
        assert kept.read_bytes() == content
    tried("Exception in training")


@slow
@pytest.mark.parametrize("step", [2, 4, 8, 11, 20])
def test_nan_stops_training_and_the_last_good_checkpoint_is_kept(step: int, tmp_path: Path, tried: Tried) -> None:
    ended = fit(tmp_path, fault=f"on_train_batch_start {step} poison")
    assert ended.code == 2
    assert f"got a training loss of nan at step {step}\n" in ended.output
    assert "try a smaller --model.optimizer.lr" in ended.output and "Traceback" not in ended.output
    kept = {path.name: read_checkpoint(path) for path in tmp_path.rglob("*.ckpt")}
    assert sorted(kept) == ([] if step <= 3 else ["last.ckpt"] if step <= EPOCH else ["best.ckpt", "last.ckpt"])
    for content in kept.values():
        assert content["global_step"] < step
        assert all(value.isfinite().all() for value in content["state_dict"].values())
    tried("NaN in the loss")


@slow
def test_learning_rate_that_explodes_is_explained(tmp_path: Path, tried: Tried) -> None:
    ended = run(tmp_path, *FIT, "--model", "ConvNet", "--model.optimizer.lr", "1e9")
    assert ended.code == 2
    assert re.search(r"got (a training loss of (nan|inf)|weights that aren't) at step \d+\n", ended.output)
    tried("NaN in the loss")


@slow
@pytest.mark.parametrize("fault", [
    "on_train_batch_end 1 limit", "on_train_batch_end 7 limit", "on_train_batch_end 13 limit",
    "on_validation_start 2 limit", "on_train_batch_end 7 lock", "on_train_batch_end 13 lock", "fsync 7 full",
    "fsync 8 full", "fsync 13 full", "replace 4 full", "replace 5 full", "replace 7 full",
])  # fmt: skip
def test_checkpoint_that_cannot_be_written_is_an_error_and_the_earlier_one_is_whole(
    fault: str, whole: Any, tmp_path: Path, tried: Tried
) -> None:
    tmp_path.chmod(0o755)
    ended = fit(tmp_path, fault=fault)
    assert ended.code == 2, ended.output
    words = {"limit": "File too large", "lock": "Permission denied", "full": "No space left on device"}
    assert f"got {words[fault.split()[2]]}" in ended.output
    assert "Traceback" not in ended.output
    assert not list(tmp_path.rglob(".*.tmp"))
    if fault == "on_train_batch_end 1 limit":  # that was before the first checkpoint
        assert not list(tmp_path.rglob("*.ckpt"))
    else:
        last(tmp_path).parent.chmod(0o755)
        resume(tmp_path, "ConvNet", whole)
    kinds = {"limit": "Disk full (file-size limit)", "full": "Disk full at a step of the write"}
    tried(kinds.get(fault.split()[2], "Folder turns read-only"))


# ---- Damaged and hostile files


def damaged(content: bytes, number: int) -> bytes:
    """A bit flipped, or the end cut off, at a place that `number` chooses."""
    chosen = random.Random(number)
    place = chosen.randrange(len(content))
    if number % 2:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << chosen.randrange(8)]) + content[place + 1 :]


def assert_noticed(path: Path, read: Callable[[Path], Any], times: int, what: str, tried: Tried) -> None:
    """Damages a file so many times: `read` refuses it (or returns None), or what it reads is right all the same."""
    right, content = read(path), path.read_bytes()
    for number in range(times):
        path.write_bytes(damaged(content, number))
        try:
            found = read(path)
        except UserError as error:
            assert "\ngot " in str(error)
            found = None
        assert found is None or plain(found) == plain(right)
        tried(f"{what} damaged: {'noticed' if found is None else 'read right all the same (padding)'}")


def test_damage_is_noticed_or_read_right(tmp_path: Path, tried: Tried) -> None:
    """Of files with few weights: a flipped bit seldom falls into a weight alone."""
    content = {
        "global_step": 21, "loops": {"fit_loop": {"state_dict": {}}}, "lr_schedulers": [{"last_epoch": 1}],
        "state_dict": {"conv1.weight": torch.arange(288.0).view(32, 1, 3, 3), "conv1.bias": torch.zeros(32)},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(32)}}, "param_groups": [{"lr": 0.01}]}],
        "class_path": "mnist_lightning.convnet.ConvNet", "hyper_parameters": {"label_smoothing": 0.0},
    }  # fmt: skip
    WholeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    features.keep(tmp_path / "a.features", torch.randn(40, 512))
    assert_noticed(tmp_path / "a.ckpt", read_checkpoint, 400, "Checkpoint", tried)
    assert_noticed(tmp_path / "a.features", lambda path: features.read(path, 40), 200, "File of features", tried)


@slow
def test_damaged_checkpoint_of_a_fit_is_refused_or_read_right(whole: Any, tmp_path: Path, tried: Tried) -> None:
    path = Path(shutil.copy(last(whole("ConvNet")[0]), tmp_path / "damaged.ckpt"))
    assert_noticed(path, read_checkpoint, 200, "Checkpoint", tried)


@slow
@pytest.mark.parametrize("number", range(4))
def test_fit_with_damaged_features_is_the_undisturbed_run(
    number: int, whole: Any, tmp_path: Path, tried: Tried
) -> None:
    undisturbed, expected = whole("ResNet18 on kept features")
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    for path in tmp_path.rglob("*.features"):
        path.write_bytes(damaged(path.read_bytes(), number))
    ended = fit(tmp_path, "ResNet18 on kept features")
    assert ended.output.count("damaged or something else they are computed again") == 3
    assert accuracy(ended) == expected
    assert_same_training(last(tmp_path), last(undisturbed))
    tried("File of features damaged: noticed")


class Trap:
    """Pickled, it is a call that makes a file; whoever unpickles it, makes the call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch.save", "torch.save before 1.6", "pickle"])
def test_booby_trap_is_refused_and_does_not_go_off(form: str, tmp_path: Path, tried: Tried) -> None:
    path, sprung = tmp_path / "trap", tmp_path / "sprung"
    content = {"state_dict": {}, "class_path": "a.B", "layer4.1.bn2.weight": Trap(sprung)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch.save")
    weights = ResNet18(str(path))
    for read in (read_checkpoint, lambda _: weights.load_pretrained(), WholeCheckpointIO().load_checkpoint):
        with pytest.raises(UserError, match="which is damaged or something else"):
            read(path)
        tried("Booby-trapped file: refused, not run")
    assert features.read(path, 40) is None
    tried("Booby-trapped file: refused, not run")
    assert not sprung.exists()
    pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap is one


# ---- Several processes


DDP = ["--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
SEVERAL = [*FIT, *RECIPES["ConvNet"].split(), *DDP, "--data.batch_size", "32"]
TWO = ["--trainer.devices", "2"]


def start(folder: Path, *args: str, torchrun: tuple[str, ...] = (), **more: str) -> "subprocess.Popen[str]":
    """`python -m mnist_lightning ARGS`; with options for torchrun, started by that."""
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(mnist_lightning.__file__).parents[1]), str(Path(faults.__file__).parent)])
    # gloo would look the machine's name up; GLOO_SOCKET_IFNAME=lo keeps to this machine.
    usual = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    by = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *by, "-m", "mnist_lightning", *args], cwd=folder, text=True, start_new_session=True,
        env={**os.environ, **usual, "XDG_CACHE_HOME": str(folder / "cache"), **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(process: "subprocess.Popen[str]") -> Ended:
    try:
        output, _ = process.communicate(timeout=BOUND)
    finally:
        try:
            os.killpg(process.pid, 9)  # the ranks that a failed test left behind
        except ProcessLookupError:
            pass
    return Ended(process.returncode, output)


def several(folder: Path, *args: str, **more: Any) -> Ended:
    return finished(start(folder, *args, **more))


def on_port(*options: str) -> tuple[str, ...]:
    """Options for torchrun, with a port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return *options, "--master_port", str(listener.getsockname()[1])


@slow
@pytest.mark.parametrize("recipe", ["ConvNet", "ResNet18"])
def test_evaluation_is_the_same_on_1_2_and_3_processes(recipe: str, whole: Any, tmp_path: Path, tried: Tried) -> None:
    checkpoint = last(whole(recipe)[0])
    metrics, rows = {}, {}
    for count in (1, 2, 3):
        given = ["--ckpt_path", str(checkpoint), "--data", "faults.PrimeDigits", "--trainer.devices", str(count)]
        for command in ("test", "predict"):
            ended = several(tmp_path, command, *given, *(DDP if count > 1 else []))
            assert ended.code == 0, ended.output
            assert ended.output.count("Test accuracy") == (command == "test")
        metrics[count] = read_metrics(checkpoint.parents[1] / "metrics.csv")[-1]
        predictions = (checkpoint.parents[1] / "predictions.csv").read_text()
        rows[count] = [row.split(",")[:3] for row in predictions.splitlines()]
    right = sum(row[1] == row[2] for row in rows[1][1:])
    assert metrics[1]["test/acc"] == torch.tensor(right / 359).item()
    for count in (2, 3):
        assert metrics[count]["test/acc"] == metrics[1]["test/acc"]
        assert metrics[count]["test/loss"] == pytest.approx(metrics[1]["test/loss"], rel=1e-5)  # in another order
        assert [row[0] for row in rows[count]] == ["index", *(str(index) for index in range(359))]
        assert rows[count] == rows[1]
        tried("test and predict on 2 and 3 processes, 359 images")


@slow
@pytest.mark.parametrize(("recipe", "fault", "code"), [
    (RECIPES["ConvNet"], "on_train_batch_start 14 SIGKILL 0", -9),
    (RECIPES["ResNet18 on kept features"], "on_train_batch_start 14 SIGKILL 0", -9),
    # Each process has gathered gradients of its own.
    (RECIPES["ConvNet"] + " --trainer.accumulate_grad_batches 4", "on_train_batch_end 6 SIGTERM 0", 143),
])  # fmt: skip
def test_fit_on_two_processes_is_one_run_and_stopped_goes_on(
    recipe: str, fault: str, code: int, tmp_path: Path, tried: Tried
) -> None:
    args = [*FIT, *recipe.split(), *DDP, *TWO, "--data.batch_size", "32"]
    ended = several(tmp_path / "a", *args)
    assert ended.code == 0, ended.output
    assert ended.output.count("Test accuracy") == 1 and len(runs(tmp_path / "a")) == 1
    assert several(tmp_path / "b", *args, FAULT=fault).code == code
    ended = several(tmp_path / "b", "fit", "--ckpt_path", "last")
    assert ended.code == 0, ended.output
    assert_same_training(last(tmp_path / "a"), last(tmp_path / "b"))
    tried("A fit on two processes, killed or stopped between two optimizer steps")


@slow
def test_sigterm_of_one_of_two_processes_leaves_a_checkpoint(tmp_path: Path, tried: Tried) -> None:
    ended = several(tmp_path, *SEVERAL, *TWO, FAULT="on_train_batch_start 8 SIGTERM 0")
    assert ended.code == 143, ended.output
    assert ended.output.count("Stopped after step 8. To go on: ") == 1
    assert read_checkpoint(last(tmp_path))["global_step"] == 8
    tried("SIGTERM in a fit on two processes")


@slow
def test_torchrun_trains_one_run(tmp_path: Path, tried: Tried) -> None:
    ended = several(tmp_path, *SEVERAL, *TWO, torchrun=on_port("--nproc_per_node", "2"))
    assert ended.code == 0, ended.output
    assert ended.output.count("Test accuracy") == 1 and len(runs(tmp_path)) == 1
    tried("fit by torchrun, two processes")


@slow
def test_weights_are_averaged_on_two_processes(tmp_path: Path) -> None:
    ended = several(tmp_path, *SEVERAL, *TWO, "--trainer.callbacks", "EMAWeightAveraging")
    assert ended.code == 0, ended.output
    assert "Test accuracy" in ended.output


@slow
def test_two_hosts_train_one_run(tmp_path: Path, tried: Tried) -> None:
    """Each agent in a folder of its own, as hosts without a common disk."""
    options = on_port("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1")
    args = [*SEVERAL, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    agents = [start(tmp_path / f"host{rank}", *args, torchrun=(*options, "--node_rank", f"{rank}")) for rank in (0, 1)]
    ended = [finished(agent) for agent in agents]
    assert [agent.code for agent in ended] == [0, 0], ended
    assert [agent.output.count("Test accuracy") for agent in ended] == [1, 0]
    assert read_checkpoint(last(tmp_path / "host0"))["global_step"] == STEPS
    assert runs(tmp_path / "host1") == []
    tried("fit by two torchrun agents, as on two hosts")


@slow
@pytest.mark.parametrize("by", ["ddp", "torchrun"])
@pytest.mark.parametrize("action", ["fail", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_dies_ends_all_with_its_error_shown(
    by: str, action: str, rank: int, tmp_path: Path, tried: Tried
) -> None:
    torchrun = on_port("--nproc_per_node", "2") if by == "torchrun" else ()
    ended = several(tmp_path, *SEVERAL, *TWO, torchrun=torchrun, FAULT=f"on_train_batch_start 5 {action} {rank}")
    assert ended.code != 0
    if action == "fail":
        assert "RuntimeError: the fault of this test" in ended.output
    read_checkpoint(last(tmp_path))
    tried("One of two processes fails or is killed")
