"""fit --ckpt_path: a run goes on as if it had never ended, wherever its checkpoint lies and whatever wrote it."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from running import DIGITS, RUN, SHORT, Fit, accuracy, command, files, last, loaded, printed_config, refused, rows
from torch.optim import Adam

from mnist_lightning import ConvNet, load_model
from mnist_lightning.commands.cli import run

QUICK = ("--pictures", "false")
WHOLE = (*DIGITS, "--data.batch_size", 64)  # 21 steps an epoch, as of the fixture `convnet`


class Bare(ConvNet):
    """One's own model, whose optimizer has no annotation: the command line then knows it as a function alone."""

    def __init__(self, optimizer=lambda params: Adam(params, lr=0.002)) -> None:
        super().__init__(optimizer=optimizer)


def assert_same_weights(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())


def versions() -> list[str]:
    return sorted(str(path.relative_to("lightning_logs")) for path in Path("lightning_logs").glob("*/version_*"))


def test_fit_resumes_a_run_in_its_folder(convnet: Path) -> None:
    out = command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, *QUICK)
    assert "epoch 3/3" in out and "epoch 2/3" not in out
    assert versions() == ["ConvNet-digits/version_0"]
    assert [row["step"] for row in rows(convnet / "metrics.csv") if row["val/acc"]] == ["20", "41", "62"]
    assert last()["epoch"] == 2
    config = yaml.safe_load((convnet / "config.yaml").read_text())
    assert (config["trainer"]["max_epochs"], config["ckpt_path"]) == (3, None)  # what repeats the whole run


def test_callbacks_of_ones_own_go_on_too(folder: Path) -> None:
    kept = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val/loss"
    command("fit", *SHORT, "--trainer.max_epochs", 2, *kept.split())
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, *QUICK)
    (epoch,) = (path.stem for path in (RUN / "checkpoints").glob("epoch*"))  # of all three the one with the lowest loss
    assert epoch == "epoch=2-step=6"


def test_fit_with_a_function_among_its_settings_is_repeated_by_its_config(folder: Path) -> None:
    pruned = "--trainer.callbacks+=ModelPruning --trainer.callbacks.pruning_fn=l1_unstructured"
    command("fit", *SHORT, "--trainer.max_epochs", 1, *pruned.split())
    command("fit", "--config", RUN / "config.yaml", *QUICK)


def test_finder_would_begin_a_run_anew(folder: Path) -> None:
    finder = "--trainer.callbacks BatchSizeFinder --trainer.callbacks.max_trials 1"
    command("fit", "--data", "running.Few", *QUICK, "--trainer.max_epochs", 1, *finder.split())
    assert "got BatchSizeFinder, which would begin it anew" in refused("fit", "--ckpt_path", "last")


def test_run_that_early_stopping_ended_has_ended(folder: Path) -> None:
    stopping = "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/acc --trainer.callbacks.mode max"
    command("fit", *SHORT, "--trainer.max_epochs", 3, *stopping.split(), "--trainer.callbacks.stopping_threshold", 0.01)
    again = command("fit", "--ckpt_path", "last", *QUICK)
    assert "already ended, at step 2: nothing was trained. EarlyStopping ended it: to train longer, leave it" in again
    command("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", *QUICK)
    assert last()["global_step"] == 6


def test_copied_run_names_its_own_folder(convnet: Path) -> None:
    shutil.copytree(convnet, "copy")
    said = command("fit", "--ckpt_path", "copy/checkpoints/last.ckpt", "--trainer.max_epochs", 3, *QUICK)
    assert "Run            copy\n" in said and "tensorboard --logdir copy\n" in said


def test_refused_fit_leaves_the_kept_state_of_a_failed_one(convnet: Path) -> None:
    kept = convnet / "checkpoints" / "exception.ckpt"
    shutil.copy(convnet / "checkpoints" / "last.ckpt", kept)
    before = kept.read_bytes()
    longer = ["--trainer.max_epochs", "3", "--trainer.val_check_interval", "99"]
    assert run(["fit", "--ckpt_path", str(kept), *longer]) == 2
    assert kept.read_bytes() == before


@pytest.mark.parametrize("cut", ["--trainer.max_steps 26", "--trainer.max_time 00:00:00:05"])
def test_fit_that_was_cut_short_has_best_and_last_and_goes_on_with_the_steps_that_are_missing(
    cut: str, convnet_fit: Fit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: next(clock))  # a second more each time that it is looked at
    out = command("fit", *WHOLE, "--trainer.max_epochs", 2, *cut.split())
    assert f"--ckpt_path {RUN}/checkpoints/best.ckpt" in out
    best, step = loaded(RUN / "checkpoints" / "best.ckpt")["global_step"], last()["global_step"]
    assert (best, step) == (21, 26) if "steps" in cut else 0 < best == step < 21
    command("fit", "--ckpt_path", "last", "--trainer.max_steps", -1, "--trainer.max_time", "null", *QUICK)
    assert_same_weights(last(), last(convnet_fit.root / RUN))
    assert versions() == ["ConvNet-digits/version_0"]


@pytest.mark.filterwarnings(r"ignore:\s*Unable to serialize instance")
def test_optimizer_that_the_command_line_cannot_write_down_comes_back_with_its_class(folder: Path) -> None:
    command("fit", "--model", f"{__name__}.Bare", *SHORT, "--trainer.max_epochs", 1)
    command("validate", "--ckpt_path", "last", *QUICK)
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2, *QUICK)
    (path,) = Path("lightning_logs").rglob("last.ckpt")
    assert loaded(path)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.002
    assert load_model(path).optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.002


def test_run_that_had_already_ended_says_so_and_how_to_go_on(convnet: Path, convnet_fit: Fit) -> None:
    before = (convnet / "checkpoints" / "best.ckpt").read_bytes()
    out = command("fit", "--ckpt_path", "last", *QUICK)
    assert "This run had already ended, at step 42: nothing was trained." in out
    assert "give a larger --trainer.max_epochs" in out
    assert accuracy(out) == accuracy(convnet_fit.out)
    assert (convnet / "checkpoints" / "best.ckpt").read_bytes() == before


@pytest.mark.parametrize("by", ["a path from inside", "a link", "a copy"])
def test_settings_of_a_run_hold_however_its_checkpoint_is_named(
    by: str, convnet: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Trainer's, too: it ends after 2 epochs, not 10. The files are where the run is; a copy starts a new one."""
    (folder / "elsewhere").mkdir()
    checkpoint = folder / convnet / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(checkpoint.parent if by == "a path from inside" else folder / "elsewhere")
    if by == "a link":
        Path("last.ckpt").symlink_to(checkpoint)
    elif by == "a copy":
        shutil.copy(checkpoint, "last.ckpt")
    before = files(folder)
    assert "This run had already ended, at step 42" in command("fit", "--ckpt_path", "last.ckpt", *QUICK)
    run = folder / "elsewhere" / RUN if by == "a copy" else folder / convnet
    new = {folder / path for path in files(folder) - before}
    assert new and all(run in path.parents for path in new)


@pytest.mark.parametrize("moved", [False, True])
def test_worse_epoch_after_resuming_does_not_replace_the_best(moved: bool, convnet: Path) -> None:
    if moved:
        shutil.move("lightning_logs", "runs/lightning_logs")
    root = "runs" if moved else "."
    checkpoints = root / RUN / "checkpoints"
    before = (checkpoints / "best.ckpt").read_bytes()
    content = loaded(checkpoints / "last.ckpt")
    content["state_dict"] = {name: torch.zeros_like(value) for name, value in content["state_dict"].items()}
    torch.save(content, checkpoints / "last.ckpt")  # goes on from a model that has forgotten everything
    settings = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--trainer.default_root_dir", root)
    command("fit", "--ckpt_path", "last", *settings, *QUICK)
    assert (checkpoints / "best.ckpt").read_bytes() == before
    assert last(root / RUN)["epoch"] == 2


@pytest.mark.parametrize(("setting", "message"), [
    ("--data.source mnist", "--data.source as in the checkpoint: digits got mnist"),
    ("--data.batch_size 32", "--data.batch_size as in the checkpoint: 64 got 32"),
    ("--data.val_size 10", "--data.val_size as in the checkpoint: 5000 got 10"),
    ("--data.split_seed 4", "--data.split_seed as in the checkpoint: 0 got 4"),
    ("--model.optimizer.lr 0.5", "--model.optimizer as in the checkpoint.* start a new run"),
    ("--seed_everything 4", "--seed_everything as in the run: 0 got 4"),
    ("--model mnist_lightning.ResNet18", "a run of ResNet18 with a checkpoint"),
])  # fmt: skip
def test_resuming_with_another_setting_is_refused(setting: str, message: str, convnet: Path) -> None:
    explained = refused("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, *setting.split())
    assert re.search(f"expected {message}", explained)


# ---- Runs of version 0.1


def as_version_0_1_wrote_it(run: Path, callbacks: list[dict[str, Any]]) -> None:
    """What the code of commit 03f69d5 left: no settings in the checkpoint, other names, a config.yaml with all."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("monitor", "monitor_mode", "pictures", "lr_find"):
        del config[name]
    for init_args in (config["model"]["init_args"], config["data"]["init_args"]):
        init_args.pop("num_classes", None)
    config["trainer"]["callbacks"] = callbacks
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for path in (run / "checkpoints").glob("*.ckpt"):
        content = loaded(path)
        for name in ("mnist_lightning", "generators", "example_input", "class_names"):
            content.pop(name, None)
        del content["hyper_parameters"]["num_classes"]
        (best,) = (name for name in content["callbacks"] if name.startswith("BestCheckpoint{"))
        state = content["callbacks"][best]
        del state["best_loss"]
        content["callbacks"] = {
            best.replace("BestCheckpoint", "RunCheckpoint"): state,
            "LastCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
            "'train_time_interval': None}": {**state, "monitor": None, "best_model_score": None, "best_k_models": {}},
        }
        torch.save(content, path)


def test_run_of_version_0_1_is_read_tested_and_resumed(convnet: Path, convnet_fit: Fit) -> None:
    as_version_0_1_wrote_it(convnet, callbacks=[])
    assert accuracy(command("test", "--ckpt_path", "best", *QUICK)) == accuracy(convnet_fit.out)
    assert f"{convnet}/predictions.csv" in command("predict", "--ckpt_path", "best")
    best = (convnet / "checkpoints" / "best.ckpt").read_bytes()
    out = command("fit", "--ckpt_path", "last", *QUICK)
    assert "This run had already ended, at step 42" in out  # its max_epochs is 2, not 10
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--trainer.limit_val_batches", 0, *QUICK)
    assert last()["global_step"] == 63
    assert (convnet / "checkpoints" / "best.ckpt").read_bytes() == best
    assert refused("fit", "--ckpt_path", "last", "--data.batch_size", 32)
    (convnet / "config.yaml").write_text("somebody: else's\n")
    assert "had already ended" in command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, *QUICK)
    assert (convnet / "config.yaml").read_text() == "somebody: else's\n"


def test_newest_run_is_resumed_whatever_its_model_with_a_callback_of_version_0_1(convnet: Path, resnet: Path) -> None:
    unfreezing = {"class_path": "mnist_lightning.unfreezing.GradualUnfreezing", "init_args": {"layers": [0]}}
    as_version_0_1_wrote_it(resnet, callbacks=[unfreezing])
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 6, "--trainer.limit_val_batches", 0, *QUICK)
    assert versions() == ["ConvNet-digits/version_0", "ResNet18-digits/version_0"]
    assert (last()["epoch"], last(resnet)["epoch"]) == (1, 5)
    (kept,) = last(resnet)["mnist_lightning"]["trainer"]["callbacks"]
    assert kept["class_path"] == "mnist_lightning.finetuning.unfreezing.GradualUnfreezing"


def test_config_of_version_0_1_is_read(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    Path("c.yaml").write_text("""trainer: {callbacks: [
        {class_path: mnist_lightning.unfreezing.GradualUnfreezing, init_args: {layers: [0]}}]}""")
    (callback,) = printed_config(capsys, "fit", "--config", "c.yaml")["trainer"]["callbacks"]
    assert callback["class_path"] == "mnist_lightning.finetuning.unfreezing.GradualUnfreezing"
