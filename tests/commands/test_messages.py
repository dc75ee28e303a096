"""What an exception says: three lines where a person can mend its cause; the user's own keep their traceback.

What the parser's reports become is in test_refusals.py.
"""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from running import DIGITS, loaded, run

from mnist_lightning.commands.messages import explain_exception
from mnist_lightning.runs.folder import shown_path

FEW = ("--data", "running.Few", "--pictures", "false", "--trainer.max_epochs", "1")

pytestmark = pytest.mark.usefixtures("folder")


def test_exception_of_the_users_own_code_keeps_its_traceback_and_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the user's own") as raised:
        run(["fit", "--model", "foreign_project.models.Breaks", *DIGITS])
    assert raised.traceback[-1].path.name == "models.py"
    folder = Path("lightning_logs", "Breaks-digits", "version_0", "checkpoints")
    assert f"ValueError: the state is kept in {folder}/exception.ckpt\n" in capsys.readouterr().err
    assert loaded(folder / "exception.ckpt")["global_step"] == 2


def test_callback_of_another_signature_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        run(["fit", *FEW, "--trainer.callbacks", "foreign_project.extras.Misread"])


@pytest.mark.filterwarnings("ignore")  # torch's, of the schedule
@pytest.mark.parametrize(("typed", "message"), [
    ("--data.source digits --data.train_size 17 --data.batch_size 16 --model ResNet18 --model.weights none "
     "--model.image_size 28 --model.trainable_layers 1",
     "expected two images or more in each training batch got one change --data.batch_size"),
    ("--data running.Few --model.scheduler StepLR --model.scheduler.step_size 0",
     "expected settings that fit together got .*modulo by zero"),
    ("--data running.Few --trainer.callbacks foreign_project.extras.KeepsAPath",
     r"expected plain values and tensors .*got an object of pathlib\.\w+ "),
])  # fmt: skip
def test_what_fails_in_training_is_explained_and_leaves_no_checkpoint(typed: str, message: str) -> None:
    with redirect_stderr(io.StringIO()) as error:
        assert run(["fit", "--pictures", "false", "--trainer.max_epochs", "1", *typed.split()]) == 2
    assert re.search(message, " ".join(error.getvalue().split()))
    assert not list(Path().rglob("last.ckpt"))


@pytest.mark.parametrize(("error", "got"), [
    (FileNotFoundError(2, "No such file or directory", b"runs/events"), "No such file or directory: runs/events"),
    (OSError(2, "No such file or directory", 3), "No such file or directory"),
    (OSError(18, "Invalid cross-device link", "a", None, b"b"), "Invalid cross-device link: a and b"),
    (OSError(5, "Input/output error"), "Input/output error"),
    (OSError("cannot send"), "cannot send"),
])  # fmt: skip
def test_error_of_the_system_is_explained_whatever_names_the_file(error: OSError, got: str) -> None:
    assert f"\ngot {got}\n" in str(explain_exception(error))


def test_path_is_shown_from_a_folder_that_was_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir("gone")
    (folder / "gone").rmdir()
    assert shown_path(folder / "a") == str(folder / "a")
