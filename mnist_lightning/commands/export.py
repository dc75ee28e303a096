"""export(): a checkpoint as one file that runs without this package: ONNX, torch.export's .pt2, or the bare weights.

B = batch size. Input and output are a model's: uint8 images (B, 1, 28, 28), 0 = paper, 255 = ink, to logits (B, 10).
Normalising and resizing are inside, and B is free.
"""

import copy
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_lightning import __version__
from mnist_lightning.runs.checkpoints import load_model, read_checkpoint
from mnist_lightning.classifier import DigitClassifier
NUM_CLASSES = 10
from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.runs.folder import find_checkpoint, shown_path
from mnist_lightning.sources import load_digits

CHECKED = [1, 7, *[124] * 8]  # batch sizes that the 1,000 images of the check come in
TOLERANCE = 1e-4  # of a logit, between the checkpoint and the file

Answer = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    needs: tuple[str, ...]  # packages of setup.cfg's extra `export`
    write: Callable[[DigitClassifier, dict[str, str]], bytes]
    read: Callable[[bytes, DigitClassifier], Answer]  # as a user of the file does


def export(ckpt_path: str, output: str) -> None:
    """Write a checkpoint's model as one file that runs without this package, after checking that it answers the same.

    Args:
        ckpt_path: a checkpoint, or best or last for the newest run's.
        output: the file to write; an older one is replaced. Its suffix is the format: .onnx, .pt2 (torch.export) or
            .safetensors (the weights alone).

    Raises:
        UserError: no such format or checkpoint, a package is missing, or the file would answer differently.
    """
    form = FORMATS.get(Path(output).suffix)
    if form is None:
        raise UserError(f"--output to end in {', '.join(FORMATS)}", output, "for example: --output model.onnx")
    require("export", *form.needs)
    if Path(output).is_dir():
        raise UserError("a file to write", f"a folder: {output}", "give --output another name.")
    path = find_checkpoint(ckpt_path)
    model = load_model(path)
    images = load_digits().train.images[: sum(CHECKED)]  # the same everywhere, without a network
    wanted = answers(model, images)
    # The layout for the CPU's convolutions goes: torch.export.save warns of it, and safetensors refuses it.
    content = form.write(model.to(memory_format=torch.contiguous_format), metadata(model, path))
    got = answers(form.read(content, model), images)
    worst = float((got - wanted).abs().max())
    differ = int((got.argmax(1) != wanted.argmax(1)).sum())
    if differ or not worst <= TOLERANCE:
        found = f"{differ} of {len(images):,} digits that differ, and logits that do by up to {worst:.1g}"
        raise UserError("a file that answers as the checkpoint does", found, "nothing was written; try another format.")
    with write_whole(output) as file:
        file.write(content)
    print(f"{'Checkpoint':<14} {shown_path(path)}")
    print(f"{'Check':<14} {len(images):,} images: all digits equal, logits to {worst:.0e}")
    print(f"{'Model':<14} {output} ({len(content) / 1e6:.1f} MB)")


def require(extra: str, *packages: str) -> None:
    """Raises UserError if one of an extra's packages isn't installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the packages of the extra `{extra}`", f"no {', '.join(missing)}", f"pip install '.[{extra}]'")


def answers(model: Answer, images: Tensor) -> Tensor:
    """Logits (N, 10) of images (N, 1, 28, 28), in batches of several sizes."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(CHECKED)])


def metadata(model: DigitClassifier, path: Path) -> dict[str, str]:
    """What the file says of itself. `val_acc` is there if the checkpoint knows it: see `validation_accuracy`."""
    checkpoint = read_checkpoint(path)
    accuracy = validation_accuracy(checkpoint)
    return {
        "model": type(model).__name__,
        "input": "uint8 (B, 1, 28, 28), 0 = paper, 255 = ink",
        "output": "logits (B, 10)",
        "classes": json.dumps([str(digit) for digit in range(NUM_CLASSES)]),
        "data": str(checkpoint.get("datamodule_hyper_parameters", {}).get("source", "unknown")),
        **({} if accuracy is None else {"val_acc": f"{accuracy:.4f}"}),
        "version": f"mnist_lightning {__version__}",
    }


def validation_accuracy(checkpoint: dict[str, Any]) -> float | None:
    """The accuracy, 0 to 1, that a checkpoint's weights had on the run's validation images.

    None if it isn't known: nothing was validated, or the checkpoint is from the middle of an epoch, when its callback
    remembers the accuracy of earlier weights.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if not loops.get("epoch_loop.batch_progress", {}).get("is_last_batch"):
        return None
    states = checkpoint.get("callbacks", {}).values()
    scores = [state["current_score"] for state in states if state.get("monitor") == "val/acc"]
    return float(scores[0]) if scores and scores[0] is not None else None


def program(model: DigitClassifier) -> torch.export.ExportedProgram:
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)  # two: of a batch of one, torch.export would make a constant
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(model: DigitClassifier, properties: dict[str, str]) -> bytes:
    import onnx

    names: Any = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    proto = torch.onnx.export(program(model), dynamo=True, **names).model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(proto, properties)
    return proto.SerializeToString()


def read_onnx(content: bytes, model: DigitClassifier) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_pt2(model: DigitClassifier, properties: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program(model), buffer, extra_files={"metadata.json": json.dumps(properties)})
    return buffer.getvalue()


def read_pt2(content: bytes, model: DigitClassifier) -> Answer:
    return torch.export.load(io.BytesIO(content)).module()


def write_safetensors(model: DigitClassifier, properties: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save(model.state_dict(), properties)


def read_safetensors(content: bytes, model: DigitClassifier) -> Answer:
    from safetensors.torch import load

    fresh = copy.deepcopy(model)
    fresh.load_state_dict(load(content))
    return fresh


FORMATS = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), write_onnx, read_onnx),
    ".pt2": Format((), write_pt2, read_pt2),
    ".safetensors": Format(("safetensors",), write_safetensors, read_safetensors),
}
