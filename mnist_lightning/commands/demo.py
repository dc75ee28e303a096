"""demo(): a page on this machine to draw digits on, and to watch the network classify them."""

import html
import os
from typing import Any

import torch
from PIL import Image

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.export import in_one_line, require
from mnist_lightning.errors import UserError
from mnist_lightning.photos.ink import NoInk, ink
from mnist_lightning.pictures.figures import feature_maps, grid, stages
from mnist_lightning.runs.folder import find_checkpoint, shown_path
from mnist_lightning.runs.saved import MNIST_EXAMPLE, Example, Saved

CANVAS = 400  # pixels a side
STYLE = """
.answer { font-size: 112px; font-weight: 700; line-height: 1; text-align: center; overflow-wrap: anywhere; }
.answer.name { font-size: 40px; line-height: 56px; }
.confidence { text-align: center; margin: 4px 0 12px; min-height: 1.5em; }
.bars { display: grid; grid-template-columns: max-content 1fr 4em; gap: 6px 8px; max-height: 320px; overflow-y: auto; }
.bars .percent { text-align: right; font-variant-numeric: tabular-nums; }
.track { background: var(--border-color-primary); border-radius: 3px; align-self: center; height: 14px; }
.bar { background: var(--color-accent); border-radius: 3px; height: 100%; }
.picture .image-frame, .picture img { width: 100%; object-fit: contain; image-rendering: pixelated; }
.picture .icon-button-wrapper { display: none; }
"""


def demo(ckpt_path: str, port: int | None = None, browser: bool = True) -> None:
    """Open a page on this machine, to draw digits on with the mouse or a finger and to see how they are classified.

    Args:
        ckpt_path: a checkpoint, or best or last for the newest run's.
        port: of 127.0.0.1; the default is one that is free.
        browser: open the page in the browser at once.

    Raises:
        UserError: Gradio isn't installed, there is no such checkpoint, its model takes other images, or the port is
            taken.
    """
    require("demo", "gradio")
    saved = Saved(find_checkpoint(ckpt_path))
    model = saved.model()
    refuse_other_images(model, saved.example)
    names = saved.names(model.num_classes)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio

    # The default theme's fonts would come from Google.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    page = build(model, names)
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, theme=theme, css=STYLE,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[],
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise UserError(f"a free port: {port}", str(error).splitlines()[0], "leave out --port.") from error
    print(f"{'Checkpoint':<14} {shown_path(saved.path)}")
    print(f"{'Page':<14} {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def refuse_other_images(model: DigitClassifier, example: Example) -> None:
    """Raises UserError if the model takes other images than the page draws."""
    got = f"one that was trained on {example.dtype} images {example.shape}"
    if example == MNIST_EXAMPLE:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
            return
        except Exception as error:  # of the model's own code
            got = in_one_line(error)
    remedy = "demo is for such models; use predict with a datamodule of your own for others."
    raise UserError("a model that takes uint8 images (1, 28, 28), as MNIST has them", got, remedy)


def build(model: DigitClassifier, names: list[str]) -> Any:
    """The page: a canvas; beside it the answer, the probabilities and what the network sees; the feature maps below."""
    import gradio

    # No label: Gradio lays it over the picture's corner.
    picture: dict[str, Any] = {"show_label": False, "buttons": [], "container": False, "elem_classes": "picture"}
    with gradio.Blocks(title="mnist_lightning", analytics_enabled=False) as page:
        gradio.Markdown(f"## Draw a digit: {type(model).__name__} classifies it")
        with gradio.Row():
            with gradio.Column(scale=5, min_width=CANVAS):
                canvas = gradio.Sketchpad(
                    type="pil", canvas_size=(CANVAS, CANVAS), height=CANVAS + 60, layers=False, transforms=(),
                    sources=(), show_label=False, value=Image.new("L", (CANVAS, CANVAS), 255), fixed_canvas=True,
                    brush=gradio.Brush(default_size=CANVAS // 28, colors=["#000000"], color_mode="fixed"),
                )  # fmt: skip
            with gradio.Column(scale=4, min_width=320):
                answer = gradio.HTML(bars(None, names))
            with gradio.Column(scale=3, min_width=240):
                gradio.Markdown("**What the network sees**")
                seen = gradio.Image(**picture)
        with gradio.Row():
            maps = []
            for name in stages(model):
                with gradio.Column():
                    gradio.Markdown(f"**Feature maps: {name}**")
                    maps.append(gradio.Image(**picture))
        # input, not change: Gradio 6 doesn't fire that for a stroke.
        canvas.input(lambda drawn: show(model, names, drawn), canvas, [answer, seen, *maps], show_progress="hidden")
    return page


def show(model: DigitClassifier, names: list[str], drawn: dict[str, Any]) -> list[Any]:
    """What the page shows of a drawing: the answer with the probabilities, the 28×28 picture, the feature maps."""
    try:
        found = ink(drawn["composite"])
    except NoInk:
        return [bars(None, names), None, *[None] * len(stages(model))]
    images = torch.from_numpy(found.image)[None, None]
    with torch.inference_mode():
        probabilities = model(images).softmax(1)[0].tolist()
    large = Image.fromarray(found.image).resize((224, 224), Image.Resampling.NEAREST)
    maps = feature_maps(model, images)  # without those that the model didn't use
    pictures = [grid(maps[name][:, None]).permute(1, 2, 0).numpy() if name in maps else None for name in stages(model)]
    return [bars(probabilities, names), large, *pictures]


def bars(probabilities: list[float] | None, names: list[str]) -> str:
    """HTML: the most probable class in large letters, and a bar for every class, in their order."""
    answer, confidence = "?", ""
    if probabilities is not None:
        best = max(range(len(names)), key=probabilities.__getitem__)
        answer, confidence = names[best], f"{100 * probabilities[best]:.1f} % confidence"
    size = "" if len(answer) < 3 else "name"
    rows = [f"<div class='answer {size}'>{html.escape(answer)}</div><div class='confidence'>{confidence}</div>"]
    rows.append("<div class='bars'>")
    for name, p in zip(names, probabilities or [0.0] * len(names), strict=True):
        bar = f"<div class='track'><div class='bar' style='width: {100 * p:.1f}%'></div></div>"
        percent = f"{100 * p:.1f} %" if probabilities else ""
        rows.append(f"<span>{html.escape(name)}</span>{bar}<span class='percent'>{percent}</span>")
    return "".join([*rows, "</div>"])
