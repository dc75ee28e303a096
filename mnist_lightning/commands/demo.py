"""demo(): a page on this machine to draw digits on, or to show it pictures, and to watch the network classify them.

Other people may have accounts on the machine, and other pages are open in the browser: what is drawn or uploaded
lies in a private folder, what is shown is part of the page, and requests that name another host, as a rebound DNS name
does, are refused, as is what is too large.
"""

import base64
import html
import io
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.export import in_one_line, require
from mnist_lightning.errors import UserError
from mnist_lightning.photos.classify import prepared
from mnist_lightning.photos.reading import NoPicture, no_doubts, opened
from mnist_lightning.pictures.figures import feature_maps, grid, stages
from mnist_lightning.runs.folder import find_checkpoint, shown_path
from mnist_lightning.runs.saved import MNIST_EXAMPLE, Example, Saved

CANVAS = 400  # pixels a side
MAX_BYTES = 10_000_000  # of what is sent; a drawing has some thousands, a phone's photo some millions
KEPT = 60, 600  # seconds: each minute, what was sent more than ten minutes ago is deleted
MAX_SIDE = 4000  # pixels of a drawing: a browser may draw at a multiple of CANVAS
STYLE = """
.answer { font-size: 112px; font-weight: 700; line-height: 1; text-align: center; overflow-wrap: anywhere; }
.answer.name { font-size: 40px; line-height: 56px; }
.confidence { text-align: center; margin: 4px 0 12px; min-height: 1.5em; }
.bars { display: grid; grid-template-columns: max-content 1fr 4em; gap: 6px 8px; max-height: 320px; overflow-y: auto; }
.bars .percent { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.track { background: var(--border-color-primary); border-radius: 3px; align-self: center; height: 14px; }
.bar { background: var(--color-accent); border-radius: 3px; height: 100%; }
.picture img { display: block; margin: auto; width: 96%; image-rendering: pixelated; }
"""


def demo(ckpt_path: str, port: int | None = None, browser: bool = True) -> None:
    """Open a page on this machine, to see how a digit that you draw is classified, or a picture that you upload.

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
    with tempfile.TemporaryDirectory(prefix="mnist_lightning-") as private:  # others can't enter it
        # Both are read when Gradio is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": private}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder goes
        with no_doubts():
            serve(build(model, names, saved.example, Path(private)), saved.path, port, browser)


def serve(page: Any, path: Path, port: int | None, browser: bool) -> None:
    """Serves the page until Ctrl-C."""
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    # The default theme's fonts would come from Google.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, theme=theme, css=STYLE,
            prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[], max_file_size=MAX_BYTES,
            app_kwargs={"middleware": [hosts]},
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise UserError(f"a free port: {port}", str(error).splitlines()[0], "leave out --port.") from error
    print(f"{'Checkpoint':<14} {shown_path(path)}")
    print(f"{'Page':<14} {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def refuse_other_images(model: DigitClassifier, example: Example) -> None:
    """Raises UserError if the model takes other images than the page gives."""
    got = f"one that was trained on {example.dtype} images {example.shape}"
    if example == MNIST_EXAMPLE or example.is_square_in_colour:
        try:
            with torch.no_grad():
                model(torch.zeros(1, *example.shape, dtype=torch.uint8))
            return
        except Exception as error:  # of the model's own code
            got = in_one_line(error)
    remedy = "demo is for such models; use predict with a datamodule of your own for others."
    expected = "a model that takes uint8 images (1, 28, 28), as MNIST has them, or (3, S, S), as ImageFolder has them"
    raise UserError(expected, got, remedy)


def build(model: DigitClassifier, names: list[str], example: Example, folder: Path) -> Any:
    """The page: a canvas, or a place for a picture; beside it the answer, the probabilities and what the network sees;
    the feature maps below.

    Args:
        folder: Gradio's own, where what the browser sends arrives.
    """
    import gradio

    drawn = example == MNIST_EXAMPLE
    asked = "Draw a digit" if drawn else "Choose a picture"
    with gradio.Blocks(title="mnist_lightning", analytics_enabled=False, delete_cache=KEPT) as page:
        gradio.Markdown(f"## {asked}: {type(model).__name__} classifies it")
        with gradio.Row():
            with gradio.Column(scale=5, min_width=CANVAS):
                given = canvas() if drawn else gradio.Image(
                    height=CANVAS + 60, sources=["upload", "clipboard"], show_label=False, buttons=[]
                )  # fmt: skip
            with gradio.Column(scale=4, min_width=320):
                answer = gradio.HTML(bars(None, names))
            with gradio.Column(scale=3, min_width=240):
                gradio.Markdown("**What the network sees**")
                seen = gradio.HTML(elem_classes="picture")
        with gradio.Row():
            maps = []
            for name in stages(model):
                with gradio.Column(min_width=200):  # ResNet18 has five
                    gradio.Markdown(f"**Feature maps: {name}**")
                    maps.append(gradio.HTML(elem_classes="picture"))

        def answered(sent: Any) -> list[str]:
            file = sent.get("composite") if drawn and isinstance(sent, dict) else sent
            return show(model, names, example, sent_file(file, folder))

        # A stroke fires input alone in Gradio 6. preprocess would open any format that Pillow has.
        when = given.input if drawn else given.change
        when(answered, given, [answer, seen, *maps], show_progress="hidden", preprocess=False)
    return page


def canvas() -> Any:
    import gradio

    return gradio.Sketchpad(
        type="pil", canvas_size=(CANVAS, CANVAS), height=CANVAS + 60, layers=False, transforms=(),
        sources=(), show_label=False, value=Image.new("L", (CANVAS, CANVAS), 255), fixed_canvas=True,
        brush=gradio.Brush(default_size=CANVAS // 28, colors=["#000000"], color_mode="fixed"),
    )  # fmt: skip


def sent_file(sent: Any, folder: Path) -> Path | None:
    """The file that Gradio has written into its folder; None where a program sends something else, or names another."""
    path = sent.get("path") if isinstance(sent, dict) else None
    if not isinstance(path, str) or "\0" in path:
        return None
    file = Path(path).resolve()
    return file if file.is_relative_to(folder.resolve()) and os.path.isfile(file) else None


def show(model: DigitClassifier, names: list[str], example: Example, file: Path | None) -> list[str]:
    """HTML of what the page shows of a drawing or a picture: the answer with the probabilities, what the network sees,
    the feature maps. Where there is none, the answer says why.
    """
    try:
        if file is None:
            raise NoPicture  # nothing was sent, or it was taken away
        with opened(file) as picture:
            if example == MNIST_EXAMPLE and max(picture.size) > MAX_SIDE:
                raise NoPicture(f"too large for a drawing: more than {MAX_SIDE:,} pixels a side")
            images = prepared(picture, example)[None]
    except NoPicture as error:
        return [bars(None, names, str(error)), "", *[""] * len(stages(model))]
    with torch.inference_mode():
        probabilities = model(images).softmax(1)[0].tolist()
    maps = feature_maps(model, images)  # without those that the model didn't use
    drawn = {name: to_html(grid(maps[name][:, None])) for name in maps}
    return [bars(probabilities, names), to_html(images[0] / 255), *(drawn.get(name, "") for name in stages(model))]


def to_html(picture: Tensor) -> str:
    """A picture (1 or 3, H, W) in [0, 1], within the page: there is no file that could change while it is fetched."""
    pixels = (255 * picture).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def bars(probabilities: list[float] | None, names: list[str], reason: str = "") -> str:
    """HTML: the most probable class in large letters, or the reason why there is none, and a bar for every class, in
    their order."""
    answer, confidence = "?", html.escape(reason)
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
