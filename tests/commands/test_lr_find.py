"""lr_find: a learning rate to try; nothing is trained, nothing is left."""

import re
from pathlib import Path

import pytest
from running import DIGITS, command, files


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a model without some of its steps
@pytest.mark.parametrize(("typed", "option"), [
    ("", "--model.optimizer.lr "),
    # A model without such an option, whose steps log val/loss alone
    ("--model foreign_project.models.Plain --model.pixels 784 --monitor val/loss --monitor_mode min", ""),
])  # fmt: skip
def test_rate_is_found_and_nothing_left(typed: str, option: str, folder: Path) -> None:
    out = command("fit", *DIGITS, "--lr_find", "true", *typed.split())
    rate = r"(\d\.?\d*|\d\.?\d*e-0[1-7])"
    assert re.fullmatch(f"A learning rate to try: {option}{rate}; nothing was trained.", out.splitlines()[-1])
    assert files(folder) == set()
