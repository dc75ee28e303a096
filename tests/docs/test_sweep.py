"""examples/sweep.py: trials are runs, chosen by validation accuracy; a second command goes on with the study."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parents[2] / "examples" / "sweep.py"
SHORT = ["--data.source", "digits", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]


def sweep(folder: Path, *args: str, code: str = "pass") -> subprocess.CompletedProcess:
    start = f"import runpy, sys; sys.path.insert(0, {str(SWEEP.parents[1])!r}); {code}; "
    start += f"sys.argv = ['sweep.py', *sys.argv[1:]]; runpy.run_path({str(SWEEP)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", start, *args], cwd=folder, capture_output=True, text=True)


def test_second_command_goes_on_with_the_study(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna isn't installed: pip install optuna")
    for trials, known in ((2, 2), (1, 3)):
        done = sweep(tmp_path, "--trials", str(trials), "--", *SHORT)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^Best of {known}: --model.optimizer.lr \S+, 0\.\d{{4}}$", done.stdout, re.M)
    assert "Test accuracy" not in done.stdout
    assert len(list(tmp_path.glob("lightning_logs/ConvNet-digits/version_*/checkpoints/best.ckpt"))) == 3


def test_wrong_option_is_an_error_in_three_lines(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna isn't installed: pip install optuna")
    done = sweep(tmp_path, "--trials", "1", "--", "--data.source", "digit")
    assert done.returncode == 2
    assert "error: expected --data.source to be one of auto, mnist, digits\n       got digit\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_optuna_it_says_what_to_install(tmp_path: Path) -> None:
    done = sweep(tmp_path, code="sys.modules['optuna'] = None")
    assert done.returncode == 2
    said = ["error: expected optuna, which the sweep needs", "       got no such package", "       pip install optuna"]
    assert done.stderr.splitlines() == said
