"""export(): a checkpoint as one file that runs without this package: ONNX, torch.export's .pt2, or the bare weights.

B = batch size, which is free, N = images, C = classes. The file takes and gives what the model does: for the shipped
ones uint8 images (B, 1, 28, 28), 0 = background, 255 = strokes, and logits (B, C). They normalise and resize inside.
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
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.runs.folder import find_checkpoint, shown_path
from mnist_lightning.runs.saved import MNIST_EXAMPLE, Example, Saved
from mnist_lightning.sources import load_digits

CHECKED = [1, 7, *[124] * 8]  # batch sizes that the 1,000 images of the check come in
TOLERANCE = 1e-4  # between the checkpoint's logits and the file's, as a share of the largest or of 1

Answer = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    needs: tuple[str, ...]  # packages of setup.cfg's extra `export`
    write: Callable[[DigitClassifier, Tensor, dict[str, str]], bytes]  # from the model, two images, and metadata
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
    suffix = Path(output).suffix
    form = FORMATS.get(suffix)
    if form is None:
        raise UserError(f"--output to end in {', '.join(FORMATS)}", output, "for example: --output model.onnx")
    if "://" in output:
        raise UserError("--output on this machine", output, "give a file, and upload it when it is written.")
    require("export", *form.needs)
    if Path(output).is_dir():
        raise UserError("a file to write", f"a folder: {output}", "give --output another name.")
    saved = Saved(find_checkpoint(ckpt_path))
    model = saved.model()
    images, kind = sample_images(saved.example)
    try:
        wanted = answers(model, images)
    except Exception as error:  # of the model's own code
        remedy = "train it anew with fit, which records in the checkpoint what images the model takes."
        raise UserError(f"a model that takes {signature(images)}", in_one_line(error), remedy) from error
    # Convolutions' weights may be laid out as channels_last: torch.export.save warns of that, and safetensors refuses.
    model = model.to(memory_format=torch.contiguous_format)
    properties = metadata(model, images, saved)
    try:
        content = form.write(model, images[:2], properties)
        got = answers(form.read(content, model), images)
    except Exception as error:  # of the exporters, which follow the model's own code
        remedy = "change forward to what torch.export can follow, or write .safetensors, the weights alone."
        raise UserError(f"a model that can be written as {suffix}", in_one_line(error), remedy) from error
    worst = float((got - wanted).abs().max())
    same = int((got.argmax(1) == wanted.argmax(1)).sum())  # within the tolerance only ties can differ
    agreement = f"{same:,} of {len(images):,} images ({kind}) classified the same"
    if not worst <= TOLERANCE * max(1, float(wanted.abs().max())):
        found = f"{agreement}, logits up to {worst:.1g} apart"
        raise UserError("a file that answers as the checkpoint does", found, "nothing was written; try another format.")
    with write_whole(output) as file:
        file.write(content)
    print(f"{'Checkpoint':<14} {shown_path(saved.path)}")
    print(f"{'Check':<14} {agreement}, logits within {worst:.0e}")
    print(f"{'Model':<14} {output} ({len(content) / 1e6:.1f} MB)")


def require(extra: str, *packages: str) -> None:
    """Raises UserError if one of an extra's packages isn't installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the packages of the extra `{extra}`", f"no {', '.join(missing)}", f"pip install '.[{extra}]'")


def sample_images(example: Example) -> tuple[Tensor, str]:
    """Images of a checkpoint's shape and dtype to compare answers on, the same each time, and what they are."""
    count = sum(CHECKED)
    if example == MNIST_EXAMPLE:
        return load_digits().train.images[:count], "scikit-learn's digits"
    size, dtype = (count, *example.shape), example.torch_dtype
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.rand(size, generator=generator).to(dtype), "random in [0, 1]"
    return torch.randint(256, size, generator=generator).to(dtype), "random in 0 to 255"


def signature(images: Tensor) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} images (B, {', '.join(map(str, images.shape[1:]))})"


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def answers(model: Answer, images: Tensor) -> Tensor:
    """Logits (N, C) of images (N, ...), in batches of several sizes."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(CHECKED)])


def metadata(model: DigitClassifier, images: Tensor, saved: Saved) -> dict[str, str]:
    """What the file says of itself."""
    as_mnist = images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28)
    return {
        "model": type(model).__name__,
        "input": signature(images) + (", 0 = background, 255 = strokes" if as_mnist else ""),
        "output": f"logits (B, {model.num_classes})",
        "classes": json.dumps(saved.names(model.num_classes)),
        "data": str(saved.data_hyperparameters.get("source", "unknown")),
        "version": f"mnist_lightning {__version__}",
    }


def program(model: DigitClassifier, images: Tensor) -> torch.export.ExportedProgram:
    # Two images: of a batch of one, torch.export would make a constant.
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(model: DigitClassifier, images: Tensor, properties: dict[str, str]) -> bytes:
    import onnx

    names: Any = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    proto = torch.onnx.export(program(model, images), dynamo=True, **names).model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(proto, properties)
    return proto.SerializeToString()


def read_onnx(content: bytes, model: DigitClassifier) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_pt2(model: DigitClassifier, images: Tensor, properties: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program(model, images), buffer, extra_files={"metadata.json": json.dumps(properties)})
    return buffer.getvalue()


def read_pt2(content: bytes, model: DigitClassifier) -> Answer:
    return torch.export.load(io.BytesIO(content)).module()


def write_safetensors(model: DigitClassifier, images: Tensor, properties: dict[str, str]) -> bytes:
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
