"""The screenshots of the docs: TensorBoard's tabs and the demo page, in headless Chromium.

    pip install '.[demo]' playwright
    python -m benchmarks.screenshots --logdir lightning_logs --run ConvNet/version_0 --output docs/images

`--run` is shown in the curves, the images, the projector and the demo; the hparams tab shows all runs of --logdir.
"""

import argparse
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

SIZE = {"width": 1280, "height": 720}  # pixels
THREE = [  # strokes of a handwritten 3, as shares of the canvas
    [(0.3, 0.27), (0.36, 0.2), (0.46, 0.165), (0.57, 0.18), (0.64, 0.25), (0.645, 0.34), (0.58, 0.42), (0.46, 0.465)],
    [(0.46, 0.465), (0.6, 0.49), (0.685, 0.57), (0.69, 0.68), (0.62, 0.78), (0.49, 0.825), (0.37, 0.8), (0.29, 0.73)],
]


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
    show(page, f"{address}#scalars&_smoothingWeight=0", run, "^(train|val|test)/(acc|loss)$")
    page.get_by_text("Ignore outliers in chart scaling").click()  # it cuts lines off at the frame
    page.wait_for_timeout(3000)


def images(page: Page, address: str, run: str) -> None:
    show(page, f"{address}#images", run, "test|feature maps")


def show(page: Page, address: str, run: str, tags: str) -> None:
    page.goto(f"{address}&regexInput={quote('^' + run + '$')}&tagFilter={quote(tags)}")
    page.wait_for_timeout(8000)


def hparams(page: Page, address: str) -> None:
    page.goto(f"{address}#hparams")
    page.wait_for_timeout(8000)


def projector(page: Page, address: str, run: str) -> None:
    page.goto(f"{address}#projector")
    page.wait_for_timeout(20000)


def demo(page: Page, address: str) -> None:
    page.goto(address)
    canvas = page.locator("canvas").last
    canvas.wait_for()
    page.wait_for_timeout(3000)
    box = canvas.bounding_box()
    assert box is not None
    for stroke in THREE:
        for i, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
            if i == 0:
                page.mouse.down()
        page.mouse.up()
        page.wait_for_timeout(1000)
    page.get_by_text(re.compile("confidence")).wait_for()
    page.wait_for_timeout(2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"))
    parser.add_argument("--run", default="ConvNet/version_0")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", nargs="+", default=["scalars", "hparams", "images", "projector", "demo"])
    args = parser.parse_args()
    best = args.logdir / args.run / "checkpoints/best.ckpt"
    tensorboard = ("-m", "tensorboard.main", "--logdir", str(args.logdir), "--port")
    page_of = ("-m", "mnist_lightning", "demo", "--ckpt_path", str(best), "--browser", "false", "--port")
    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        options = ["--use-gl=swiftshader", "--enable-webgl", "--ignore-gpu-blocklist", "--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=found, args=options)
        with server(*tensorboard) as address:
            for name, draw in (("scalars", scalars), ("images", images), ("projector", projector)):
                if name in args.only:
                    page = browser.new_page(viewport=SIZE)
                    draw(page, address, args.run)
                    page.screenshot(path=args.output / f"tensorboard-{name}.png")
            if "hparams" in args.only:
                page = browser.new_page(viewport=SIZE)
                hparams(page, address)
                page.screenshot(path=args.output / "tensorboard-hparams.png")
        if "demo" in args.only:
            with server(*page_of) as address:
                page = browser.new_page(viewport=SIZE)
                demo(page, address)
                page.screenshot(path=args.output / "demo.png", full_page=True)


if __name__ == "__main__":
    main()
