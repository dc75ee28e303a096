"""What `predict` says of a person's pictures: a table, one line each on the screen, a contact sheet on request.

C = classes, F = pictures that were read, S = pixels a side.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from mnist_lightning.files import write_whole
from mnist_lightning.photos.contact_sheet import contact_sheet, save
from mnist_lightning.runs.predictions import write_table

UNSURE = 0.5  # a confidence below this gets a remark


class Answered(NamedTuple):
    """A picture to predict, or a file that gives none."""

    name: str  # relative to the folder that was given
    image: Tensor | None  # as the network sees it: uint8 (1 or 3, S, S); None where there is none
    remark: str  # the reason for that, or a doubt; "" otherwise
    label: str = ""  # the name of its class, where that is known


@runtime_checkable
class FromFiles(Protocol):
    """A datamodule whose images to predict are a person's files."""

    table_name: str  # of the file that the answers are written to

    def tell(self, probabilities: Tensor, path: Path, names: list[str]) -> bool:
        """Writes and prints the answers; returns whether every picture was classified.

        Args:
            probabilities: (F, C), in the order of the batches.
            path: the CSV file.
            names: of the C classes.
        """


def write_and_print(
    pictures: Sequence[Answered], probabilities: Tensor, path: Path, names: list[str], sheet: Path | None
) -> bool:
    """The same of `pictures`, in whose order the probabilities are; the contact sheet goes to `sheet`."""
    columns: dict[str, list[str]] = {name: [] for name in ("file", "label", "predicted", "second", "remark")}
    values: list[list[float]] = []
    printed: list[tuple[str, ...]] = [("file", "classified as", "confidence", "second guess", "")]
    images, captions = [], []
    left = iter(probabilities.tolist())
    for name, image, remark, label in pictures:
        p: list[float] = next(left, []) if image is not None else []
        if image is not None and p:
            best, second = sorted(range(len(p)), key=p.__getitem__, reverse=True)[:2]
            if p[best] < UNSURE:
                remark = f"{remark}; unsure" if remark else "unsure"
            guesses = names[best], names[second]
            runner_up = f"{names[second]} ({100 * p[second]:.1f} %)"
            wrong = f"it is {label}" if label not in ("", names[best]) else ""
            doubts = "; ".join(filter(None, (wrong, remark)))
            printed.append((name, names[best], f"{100 * p[best]:.1f} %", runner_up, doubts))
            captions.append((name, f"{names[best]}  {100 * p[best]:.0f} %"))
            images.append(image)
        else:
            remark = remark or "left out by --trainer.limit_predict_batches"
            guesses = "", ""
            printed.append((name, "-", "", "", remark))
        values.append(p)
        for column, cell in zip(columns.values(), (name, label, *guesses, remark), strict=True):
            column.append(cell)
    answered = zip(columns["label"], columns["predicted"], strict=True)
    right = [label == predicted for label, predicted in answered if label and predicted]
    if not any(columns["label"]):
        del columns["label"]
    # Written first: the table may go to a pipe that closes early.
    write_table(path, columns, values, [f"p{name}" for name in names])
    if sheet is not None:
        with write_whole(sheet) as file:
            save(contact_sheet(images, captions), file)
    print_table(printed)
    if right:
        print(f"Accuracy       {100 * sum(right) / len(right):.2f} % of {len(right):,} whose class is known")
    return len(images) == len(pictures)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints rows in columns, with a "?" for line breaks and the like."""
    rows = [tuple("".join(letter if letter.isprintable() else "?" for letter in cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
