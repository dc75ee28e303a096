"""Checkpoint files: written whole or not at all, read without running anything in them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's own goes by the temp folder, moves without fsync, and swallows a PermissionError."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with write_whole(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of this project.

    Raises:
        UserError: there is no such file, it is damaged, or it isn't a checkpoint of this project.
    """
    expected, remedy = "a checkpoint of this project", "give --ckpt_path best, last or another file."
    checkpoint = load_safely(path, expected, remedy, map_location)
    if not isinstance(checkpoint, dict) or "_class_path" not in checkpoint.get("hyper_parameters", {}):
        raise UserError(expected, f"{path}, which is something else", remedy)
    return checkpoint


def load_safely(path: Path, expected: str, remedy: str, map_location: Any = "cpu") -> Any:
    """torch.load with weights_only=True, so that a hostile file runs nothing; errors in words.

    Raises:
        UserError: there is no such file, or torch can't read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, in files that are no pickles
            return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(expected, f"no such file: {path}", remedy) from error
    except IsADirectoryError as error:
        raise UserError(expected, f"a folder: {path}", remedy) from error
    except PermissionError as error:
        raise UserError(expected, f"a file without read permission: {path}", remedy) from error
    except Exception as error:  # torch.load answers damaged bytes with a dozen kinds of exception
        raise UserError(expected, f"{path}, which is damaged or something else", remedy) from error
