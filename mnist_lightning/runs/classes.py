"""What the classes are called: by the datamodule or the checkpoint where it says so, else 0, 1, 2, ..."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class NamesClasses(Protocol):
    """A datamodule that names its classes, in the order of their labels."""

    class_names: Sequence[str]


def class_names(datamodule: object, count: int) -> list[str]:
    """A name for each of `count` classes: the datamodule's where it names just as many, else their numbers."""
    names = datamodule.class_names if isinstance(datamodule, NamesClasses) else ()
    return [str(name) for name in names] if len(names) == count else [str(label) for label in range(count)]
