"""examples/sweep.py: trials are runs, chosen by validation accuracy; a second command goes on with the study."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parents[2] / "examples" / "sweep.py"
SHORT = ["--data.source", "digits", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]

pytestmark = pytest.mark.usefixtures("folder")


def sweep(*args: str) -> None:
    sys.argv[1:] = args  # conftest.py puts it back
    runpy.run_path(str(SWEEP), run_name="__main__")


def test_second_command_goes_on_with_the_study(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna", reason="optuna isn't installed: pip install optuna")
    for trials, known in ((2, 2), (1, 3)):
        sweep("--trials", str(trials), "--", *SHORT)
        printed = capsys.readouterr().out
        assert re.search(rf"^Best of {known}: --model.optimizer.lr \S+, 0\.\d{{4}}$", printed, re.M)
    assert "Test accuracy" not in printed
    assert len(list(Path().glob("lightning_logs/ConvNet-digits/version_*/checkpoints/best.ckpt"))) == 3


def test_wrong_option_is_an_error_in_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna", reason="optuna isn't installed: pip install optuna")
    with pytest.raises(SystemExit, match="2"):
        sweep("--trials", "1", "--", "--data.source", "digit")
    expected = "error: expected --data.source to be one of auto, mnist, digits\n       got digit\n"
    assert expected in capsys.readouterr().err


def test_without_optuna_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit, match="2"):
        sweep()
    said = ["error: expected optuna, which the sweep needs", "       got no such package", "       pip install optuna"]
    assert capsys.readouterr().err.splitlines() == said
