"""What an exception says: three lines where a person can mend its cause; the user's own keep their traceback.

What the parser's reports become is in test_refusals.py.
"""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from running import DIGITS, loaded, run

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
     "--model.image_size 28 --model.normalize_features true",
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
