"""What classes are called."""

from types import SimpleNamespace

import pytest

from mnist_lightning.runs.classes import class_names


@pytest.mark.parametrize(("datamodule", "names"), [
    (SimpleNamespace(class_names=("cat", "dog", 3)), ["cat", "dog", "3"]),
    (SimpleNamespace(class_names=["cat", "dog"]), ["0", "1", "2"]),  # of another number of classes
    (SimpleNamespace(class_names=None), ["0", "1", "2"]),
    (None, ["0", "1", "2"]),
])  # fmt: skip
def test_datamodule_names_its_classes_or_they_are_numbers(datamodule: object, names: list[str]) -> None:
    assert class_names(datamodule, 3) == names
