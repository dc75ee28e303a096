"""The screenshots of the docs: TensorBoard's tabs and the demo page, in headless Chromium.

    pip install '.[demo]' playwright
    python -m benchmarks.screenshots --logdir lightning_logs --run ConvNet/version_0 --output docs/images

`--run` is shown in the curves, the images, the projector and the demo; the hparams tab shows all runs of --logdir.
"""

import argparse
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

GPU_IN_SOFTWARE = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # for the projector
FIND = """(name) => {
    const find = (root) => {
        for (const element of root.querySelectorAll("*")) {
            if (element.localName === name) return element;
            const inside = element.shadowRoot && find(element.shadowRoot);
            if (inside) return inside;
        }
    };
    return find(document);
}"""
HIDDEN = ("augment", "batch_size", "label_smoothing", "num_classes")  # columns of hparams without a difference


def three() -> list[tuple[float, float]]:
    """A handwritten 3 as one stroke, in shares of the canvas."""
    upper = [(0.46 + 0.17 * math.cos(a), 0.31 + 0.15 * math.sin(a)) for a in steps(-2.8, 1.7)]
    lower = [(0.46 + 0.2 * math.cos(a), 0.645 + 0.19 * math.sin(a)) for a in steps(-1.6, 2.7)]
    return upper + lower


def steps(first: float, last: float) -> list[float]:
    return [first + (last - first) * i / 25 for i in range(26)]


@contextmanager
def server(*command: str) -> Iterator[str]:
    """A command that serves a page on this machine at a port that is appended to it; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, *command, str(port)], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(120):
            try:
                urlopen(address).close()
                break
            except URLError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


def scalars(page: Page, address: str, run: str) -> None:
    show(page, f"{address}#scalars&_smoothingWeight=0", run, "^(train|val)/(acc|loss)$")
    page.get_by_text("Ignore outliers in chart scaling").click()  # it cuts lines off at the frame
    page.wait_for_timeout(3000)


def images(page: Page, address: str, run: str) -> None:
    show(page, f"{address}#images", run, "test/(conf|mis)")
    page.get_by_text("Show actual image size").click()
    page.wait_for_timeout(2000)


def show(page: Page, address: str, run: str, tags: str) -> None:
    page.goto(f"{address}&regexInput={quote('^' + run + '$')}&tagFilter={quote(tags)}")
    page.wait_for_timeout(10000)


def hparams(page: Page, address: str, run: str) -> None:
    page.goto(f"{address}#hparams")
    page.wait_for_timeout(10000)
    for column in (*HIDDEN, "optimizer/lr"):
        page.get_by_text(column, exact=True).first.click()
    page.get_by_text("Hyperparameters", exact=True).scroll_into_view_if_needed()
    page.mouse.move(422, 156)
    page.mouse.down()
    page.mouse.move(480, 156, steps=10)  # the names of the runs in full
    page.mouse.up()
    page.mouse.move(770, 600)
    page.wait_for_timeout(2000)


def projector(page: Page, address: str, run: str) -> None:
    page.goto(f"{address}#projector")  # it opens with the first run
    page.wait_for_timeout(30000)
    frame = page.frames[-1]
    # Not by clicks: the moving picture keeps a slow machine too busy to take them.
    frame.evaluate_handle(FIND, "vz-projector-data-panel").evaluate(
        "panel => { panel.selectedColorOptionName = 'label' }"
    )
    # t-SNE in the plane keeps the classes apart, where three principal components put one before another.
    frame.evaluate_handle(FIND, "vz-projector-projections-panel").evaluate(
        "panel => { panel.showTab('tsne'); setTimeout(() => { panel.tSNEis3d = false }, 5000) }"
    )
    page.wait_for_timeout(90_000)
    page.mouse.move(645, 420)
    page.mouse.wheel(0, 150)  # farther away; that ends the rotation, too
    page.mouse.move(1100, 600)
    page.wait_for_timeout(5000)


def demo(page: Page, address: str) -> None:
    page.goto(address)
    canvas = page.locator("canvas").last
    canvas.wait_for()
    page.wait_for_timeout(5000)
    box = canvas.bounding_box()
    assert box is not None
    for i, (x, y) in enumerate(three()):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    page.get_by_text(re.compile("confidence")).wait_for()
    page.wait_for_timeout(5000)


TABS = {  # how each is drawn; and which part of a window 1280 pixels wide is kept: left, top, height
    "scalars": (scalars, 0, 0, 720),
    "images": (images, 0, 0, 766),
    "hparams": (hparams, 262, 64, 316),
    "projector": (projector, 0, 0, 812),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"))
    parser.add_argument("--run", default="ConvNet/version_0")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", nargs="+", default=[*TABS, "demo"])
    args = parser.parse_args()
    best = args.logdir / args.run / "checkpoints/best.ckpt"
    tensorboard = ("-m", "tensorboard.main", "--logdir", str(args.logdir), "--port")
    drawing = ("-m", "mnist_lightning", "demo", "--ckpt_path", str(best), "--browser", "false", "--port")
    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=found, args=[*GPU_IN_SOFTWARE, "--no-sandbox"])
        with server(*tensorboard) as address:
            browser.new_page().goto(address)  # reads the events; else the first tab may be missing
            time.sleep(10)
            for name, (draw, left, top, height) in TABS.items():
                if name in args.only:
                    page = browser.new_page(viewport={"width": 1280, "height": max(720, top + height)})
                    draw(page, address, args.run)
                    kept: Any = {"x": left, "y": top, "width": 1280 - left, "height": height}
                    page.screenshot(path=args.output / f"tensorboard-{name}.png", clip=kept, timeout=90_000)
                    page.close()
        if "demo" in args.only:
            with server(*drawing) as address:
                page = browser.new_page(viewport={"width": 1280, "height": 720})
                demo(page, address)
                page.screenshot(path=args.output / "demo.png", full_page=True)


if __name__ == "__main__":
    main()
