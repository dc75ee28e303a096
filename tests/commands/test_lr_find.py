"""lr_find: a learning rate to try; nothing is trained, nothing is left."""

import math
import re
from pathlib import Path

import pytest
from running import DIGITS, command, files

from mnist_lightning.commands.lr_find import steepest


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a model without some of its steps
@pytest.mark.parametrize(("typed", "option"), [
    ("fit --lr_find true", "--model.optimizer.lr "),
    ("lr_find --data.train_size 128", "--model.optimizer.lr "),  # eight steps an epoch
    # A model without such an option, whose steps log val/loss alone
    ("lr_find --model foreign_project.models.Plain --model.pixels 784 --monitor val/loss --monitor_mode min", ""),
])  # fmt: skip
def test_rate_is_found_and_nothing_left(typed: str, option: str, folder: Path) -> None:
    out = command(*typed.split(), *DIGITS)
    found = re.fullmatch(f"A learning rate to try: {option}(.*); nothing was trained.", out.splitlines()[-1])
    assert 1e-5 < float(found[1]) < 1
    assert files(folder) == set()


def test_config_of_a_run_is_taken(convnet: Path) -> None:
    assert "A learning rate to try" in command("lr_find", "--config", convnet / "config.yaml")


def test_rate_is_where_the_loss_falls_fastest_by_a_factor_of_the_rate() -> None:
    """With noise at small rates that any slope by the rate itself would take for the steepest fall."""
    rates = [10 ** (-8 + step / 10) for step in range(80)]
    losses = [1 / (1 + (rate / 1e-2) ** 2) + 1e-4 * (-1) ** step for step, rate in enumerate(rates)]
    assert math.log10(steepest(rates, losses)) == pytest.approx(-2, abs=0.15)
    assert steepest(rates[:12], losses[:12]) is None
