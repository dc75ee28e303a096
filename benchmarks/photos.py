"""One's own handwriting: MNIST's test digits on synthetic pages, read as photos are, beside the plain digits.

    python -m benchmarks.photos --ckpt_path lightning_logs/ConvNet/version_0/checkpoints/best.ckpt --data_dir data

Prints Markdown. "Inverted and resized" is what one tries first: grey, light ink on dark, 28×28 pixels.
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.pages import page
from benchmarks.report import machine, table
from mnist_lightning import load_model
from mnist_lightning.photos.ink import NoInk, ink
from mnist_lightning.sources import load_mnist


def simply(picture: Image.Image) -> np.ndarray:
    grey = picture.convert("L")
    grey = ImageOps.invert(grey) if np.median(np.asarray(grey)) > 127 else grey
    return np.asarray(grey.resize((28, 28)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--count", type=int, default=1000, help="so many of the 10,000 test digits")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    test = load_mnist(options.data_dir).test
    rng = np.random.default_rng(options.seed)
    chosen = rng.permutation(len(test.labels))[: options.count]
    ways = {"plain digits": [], "pages, inverted and resized": [], "pages, `--data Photos`": []}
    for digit in test.images[chosen, 0].numpy():
        picture = page(digit, rng)
        try:
            found = ink(picture).image
        except NoInk:
            found = np.zeros((28, 28), np.uint8)
        for images, image in zip(ways.values(), (digit, simply(picture), found), strict=True):
            images.append(image)
    model, labels = load_model(options.ckpt_path), test.labels[chosen]
    rows = []
    for name, images in ways.items():
        with torch.inference_mode():
            right = model(torch.from_numpy(np.stack(images))[:, None]).argmax(1) == labels
        rows.append([name, f"{100 * float(right.float().mean()):.1f}"])
    print(f"{len(chosen):,} digits; {machine()}\n")
    print(table(["", "classified correctly, %"], rows))


if __name__ == "__main__":
    main()
