"""export(): a checkpoint as one file that runs without this package: ONNX, torch.export's .pt2, or the bare weights.

B = batch size, which is free, N = images, C = classes, S = pixels a side. The file takes and gives what the model does:
for the shipped ones uint8 images, (B, 1, 28, 28), 0 = background, 255 = strokes, or (B, 3, S, S), RGB, and logits
(B, C). They normalise inside.
"""

import copy
import importlib.util
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_lightning import __version__
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.photos.image_folder import ImageFolder
from mnist_lightning.photos.reading import MARGIN
from mnist_lightning.runs.folder import find_checkpoint, shown_path
from mnist_lightning.runs.saved import MNIST_EXAMPLE, Example, Saved
from mnist_lightning.sources import load_digits

CHECKED = 1000  # images, or fewer large ones:
PIXELS = 15_000_000  # numbers that they may have: 99 pictures of 224×224 in colour
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
    images, kind = sample_images(saved)
    try:
        wanted = answers(model, images)
    except Exception as error:  # of the model's own code
        remedy = "train it anew with fit, which records in the checkpoint what images the model takes."
        raise UserError(f"a model that takes {signature(saved.example)}", in_one_line(error), remedy) from error
    # Convolutions' weights may be laid out as channels_last: torch.export.save warns of that, and safetensors refuses.
    model = model.to(memory_format=torch.contiguous_format)
    properties = metadata(model, saved)
    try:
        # Two images: of a batch of one, torch.export would make a constant. Black ones: a .pt2 file holds them.
        content = form.write(model, images.new_zeros(2, *images.shape[1:]), properties)
        got = answers(form.read(content, model), images)
    except Exception as error:  # of the exporters, which follow the model's own code
        remedy = "change forward to what torch.export can follow, or write .safetensors, the weights alone."
        raise UserError(f"a model that can be written as {suffix}", in_one_line(error), remedy) from error
    worst = float((got - wanted).abs().max())
    same = int((got.argmax(1) == wanted.argmax(1)).sum())  # within the tolerance only ties can differ
    names, labels = saved.names(wanted.shape[1]), wanted.argmax(1).unique().tolist()
    spread = f"as {len(labels)} of {len(names)} classes" if len(labels) > 1 else f"all as {names[labels[0]]}"
    agreement = f"{same:,} of {len(images):,} images ({kind}) classified the same, {spread}"
    if not worst <= TOLERANCE * max(1, float(wanted.abs().max())):
        found = f"{agreement}, logits up to {worst:.1g} apart"
        raise UserError("a file that answers as the checkpoint does", found, "nothing was written; try another format.")
    with write_whole(output) as file:
        file.write(content)
    print(f"{'Checkpoint':<14} {shown_path(saved.path)}")
    if not saved.tells_its_images:
        print(f"{'Images':<14} taken to be {signature(saved.example)}: the checkpoint doesn't say what they were like")
    print(f"{'Check':<14} {agreement}, logits within {worst:.0e}")
    print(f"{'Model':<14} {output} ({len(content) / 1e6:.1f} MB)")


def require(extra: str, *packages: str) -> None:
    """Raises UserError if one of an extra's packages isn't installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the packages of the extra `{extra}`", f"no {', '.join(missing)}", f"pip install '.[{extra}]'")


def sample_images(saved: Saved) -> tuple[Tensor, str]:
    """Images to compare answers on, the same each time, and what they are: of the checkpoint's own data where they can
    be had, else random ones of the same form."""
    shape, dtype = saved.example.shape, saved.example.torch_dtype
    count = max(2, min(CHECKED, PIXELS // math.prod(shape)))
    if saved.example == MNIST_EXAMPLE:
        return load_digits().train.images[:count], "scikit-learn's digits"
    if saved.data_name == ImageFolder.__name__ and saved.is_of_its_run():
        try:
            data = ImageFolder(**saved.data_hyperparameters)
            data.setup("test")
            return data.test_set[list(range(min(count, len(data.test_set))))][0], "of its test pictures"
        except (UserError, TypeError):
            pass  # they are elsewhere now, or of another version's ImageFolder
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.rand(count, *shape, generator=generator).to(dtype), "random in [0, 1]"
    return torch.randint(256, (count, *shape), generator=generator).to(dtype), "random in 0 to 255"


def signature(example: Example) -> str:
    return f"{example.dtype} images (B, {', '.join(map(str, example.shape))})"


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def answers(model: Answer, images: Tensor) -> Tensor:
    """Logits (N, C) of images (N, ...), in batches of several sizes."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in (images[:1], *images[1:].split(32))])


def metadata(model: DigitClassifier, saved: Saved) -> dict[str, str]:
    """What the file says of itself."""
    example, data = saved.example, saved.data_name
    said = {"input": signature(example)}
    if example == MNIST_EXAMPLE:
        said["input"] += ", 0 = background, 255 = strokes"
    elif data == ImageFolder.__name__:
        size = example.shape[1]
        said["input"] += ", RGB, 0 to 255"
        said |= {"size": str(size), "resize": f"short side to {MARGIN * size:.0f} (256/224 of {size}), centre crop"}
    return {
        "model": type(model).__name__,
        **said,
        "output": f"logits (B, {model.num_classes})",
        "classes": json.dumps(saved.names(model.num_classes)),
        "data": str(saved.data_hyperparameters.get("source", data)) if data == "MNISTDataModule" else data or "unknown",
        "version": f"mnist_lightning {__version__}",
    }


def program(model: DigitClassifier, images: Tensor) -> torch.export.ExportedProgram:
    found = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in found.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names the folders of this machine
    return found


def write_onnx(model: DigitClassifier, images: Tensor, properties: dict[str, str]) -> bytes:
    import onnx

    names: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    exported = torch.onnx.export(program(model, images), dynamo=True, verbose=False, **names)
    proto = exported.model_proto  # type: ignore[union-attr]
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
