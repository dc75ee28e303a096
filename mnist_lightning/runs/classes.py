"""What the classes are called: by the datamodule or the checkpoint where it says so, else 0, 1, 2, ..."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class NamesClasses(Protocol):
    """A datamodule that names its classes, in the order of their labels."""

    class_names: Sequence[str]


def named_classes(datamodule: object) -> list[str]:
    """The datamodule's names for its classes; empty if it has none."""
    names = datamodule.class_names if isinstance(datamodule, NamesClasses) else None
    return [str(name) for name in names] if isinstance(names, Sequence) else []


def class_names(datamodule: object, count: int) -> list[str]:
    """A name for each of `count` classes: the datamodule's where it names just as many, else their numbers."""
    return names_or_numbers(named_classes(datamodule), count)


def names_or_numbers(names: Sequence[str] | None, count: int) -> list[str]:
    """These names, if they are of `count` classes; else the classes' numbers."""
    return list(names) if names and len(names) == count else [str(label) for label in range(count)]
