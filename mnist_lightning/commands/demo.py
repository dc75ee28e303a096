"""demo(): a page on this machine to draw digits on, and to watch the network read them."""

import os
from typing import Any

import torch
from PIL import Image

from mnist_lightning.runs.checkpoints import load_model
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.errors import UserError
from mnist_lightning.commands.export import require
from mnist_lightning.photos.ink import NoInk, ink
from mnist_lightning.pictures.figures import feature_maps, grid
from mnist_lightning.runs.folder import find_checkpoint, shown_path

CANVAS = 400  # pixels a side


def demo(ckpt_path: str, port: int | None = None, browser: bool = True) -> None:
    """Open a page on this machine, to draw digits on with the mouse or a finger and to see how they are read.

    Args:
        ckpt_path: a checkpoint, or best or last for the newest run's.
        port: of 127.0.0.1; the default is one that is free.
        browser: open the page in the browser at once.

    Raises:
        UserError: Gradio isn't installed, there is no such checkpoint, or the port is taken.
    """
    require("demo", "gradio")
    path = find_checkpoint(ckpt_path)
    model = load_model(path)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio

    # The default theme's fonts would come from Google.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    page = build(model)
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, theme=theme,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"a free port: {port}", str(error).splitlines()[0], "leave out --port.") from error
    print(f"{'Checkpoint':<14} {shown_path(path)}")
    print(f"{'Page':<14} {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def build(model: DigitClassifier) -> Any:
    """The page: a canvas; beside it the probabilities, what the network sees, and each stage's feature maps."""
    import gradio

    with gradio.Blocks(title="mnist_lightning", analytics_enabled=False) as page:
        gradio.Markdown(f"### Draw a digit: {type(model).__name__} reads it")
        with gradio.Row():
            canvas = gradio.Sketchpad(
                type="pil", canvas_size=(CANVAS, CANVAS), scale=2, layers=False, transforms=(), sources=(),
                show_label=False, value=Image.new("L", (CANVAS, CANVAS), 255), fixed_canvas=True,
                brush=gradio.Brush(default_size=CANVAS // 28, colors=["#000000"], color_mode="fixed"),
            )  # fmt: skip
            answer = gradio.Label(label="Probabilities", num_top_classes=10)
            seen = gradio.Image(label="What the network sees", buttons=[])
        with gradio.Row():
            maps = [gradio.Image(label=f"Feature maps: {name}", buttons=[]) for name in model.stages()]
        # input, not change: Gradio 6 doesn't fire that for a stroke.
        canvas.input(lambda drawn: read(model, drawn), canvas, [answer, seen, *maps], show_progress="hidden")
    return page


def read(model: DigitClassifier, drawn: dict[str, Any]) -> list[Any]:
    """What the page shows of a drawing: the probabilities by digit, the 28×28 picture, the feature maps."""
    try:
        found = ink(drawn["composite"])
    except NoInk:
        return [None, None, *[None] * len(model.stages())]
    images = torch.from_numpy(found.image)[None, None]
    with torch.inference_mode():
        probabilities = model(images).softmax(1)[0].tolist()
    large = Image.fromarray(found.image).resize((224, 224), Image.Resampling.NEAREST)
    maps = [grid(values[:, None]).permute(1, 2, 0).numpy() for values in feature_maps(model, images).values()]
    return [{str(digit): p for digit, p in enumerate(probabilities)}, large, *maps]
