"""The lesson's outputs, figures, line numbers and notebooks, made from its two pages.

python -m benchmarks.lesson run                    run the digits' listings and commands: outputs and figures
python -m benchmarks.lesson run --mnist DATA_DIR   run the listings on MNIST: its outputs, and two figures
python -m benchmarks.lesson links                  the line numbers of the links into the package
python -m benchmarks.lesson notebooks              docs/tutorial*.ipynb

A page's fenced blocks: `python` is run in order in one namespace; `python figure` draws, and is folded; `python words`
is the one block that each page has of its own: it defines `save`, which puts a figure's words into the page's language.
`py` is an exercise's solution and is run in a copy of the namespace. `text` after either is what was printed, to the
last digit; `text trained` depends on training, and `text rough` on a training that goes another way on another
processor, so their decimals agree within TOLERANCES; `text mnist` is MNIST's output. `console` holds commands after
"$ " and what they print.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/tutorial.md", ROOT / "docs/tutorial.zh-CN.md")
FIGURES = ("lesson", "lesson.zh-CN")  # the pages' folders in docs/images/
# Of decimals that depend on training: absolute, and as a share of the page's number.
TOLERANCES = {"trained": (0.05, 0.03), "rough": (0.1, 0.2)}

FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")
FOLD = re.compile(r"^<details><summary>.*?</summary>\n\n(.*?)^</details>\n", re.MULTILINE | re.DOTALL)
DRAWN = re.compile(r"^!\[(.*)\]\((images/.*\.png)\)\n\n(<details>.*\n\n```python figure)\n", re.MULTILINE)
LISTING = re.compile(
    r"^```(?P<kind>py|python|python words|python figure (?P<picture>[^\n]*))\n(?P<code>.*?)^```\n"
    r"(\n```text( trained| rough)?\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
# What a notebook hides of a cell; of a figure its source as well.
HIDDEN: dict[str, tuple[str, ...]] = {"py": ("source", "outputs"), "python": (), "python words": ("source",)}

# The first cell of a notebook.
SETUP = """\
import os
import subprocess
import sys
from importlib.util import find_spec

if os.path.basename(os.getcwd()) == "docs":
    os.chdir("..")  # the project's folder: its data/ is used, and the commands below are typed there
needed = {"torch": "torch", "torchvision": "torchvision", "lightning": "lightning", "sklearn": "scikit-learn",
          "matplotlib": "matplotlib"}
missing = [package for module, package in needed.items() if find_spec(module) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
"""


class Block(NamedTuple):
    language: str
    kind: str  # the second word of the fence, or nothing
    content: str
    span: tuple[int, int]  # of the content in the page


def blocks(page: str) -> list[Block]:
    return [Block(m[1], m[2] or "", m[3], m.span(3)) for m in FENCE.finditer(page)]


def sections(page: str) -> list[str]:
    """The page cut before each heading of the second level; the first part is the introduction."""
    return re.split(r"^(?=## )", page, flags=re.MULTILINE)


class Lesson:
    """Runs listings as a reader does: one after the other, in one namespace, in one folder."""

    def __init__(self, folder: Path, source: str = "digits") -> None:
        self.folder, self.source = folder, source
        self.names: dict[str, Any] = {"__name__": "lesson"}

    def run(self, block: Block) -> str:
        import matplotlib.pyplot as plt

        code = block.content.replace('SOURCE = "digits"', f'SOURCE = "{self.source}"')
        names = self.names if block.language == "python" else dict(self.names)
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "listing", "exec"), names)
        finally:
            os.chdir(here)
            plt.close("all")
        return out.getvalue()

    def draw_in_chinese(self, figure: Block) -> None:
        """Draws a figure once more, with the Chinese page's `save`, in lesson/zh-CN."""
        (words,) = (block for block in blocks(PAGES[1].read_text()) if block.kind == "words")
        mine, folder = dict(self.names), self.names["OUT"] / "zh-CN"
        (self.folder / folder).mkdir(exist_ok=True)
        try:
            self.names["OUT"] = folder
            self.run(words)
            self.run(figure)
        finally:
            self.names.clear()
            self.names.update(mine)

    def command(self, line: str) -> str:
        """What `python -m mnist_lightning ...` prints."""
        words = [sys.executable, "-W", "ignore", *line.split()[1:]]
        cache = str(self.folder / "cache")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache}
        ended = subprocess.run(words, cwd=self.folder, env=env, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{line}\n{ended.stdout}{ended.stderr}")
        return ended.stdout.replace(cache, "~/.cache")


def numbers_agree(printed: str, page: str, kind: str) -> bool:
    mine, theirs = (float(number.replace(",", "")) for number in (printed, page))
    if "." in page and kind in TOLERANCES:
        absolute, share = TOLERANCES[kind]
        return abs(mine - theirs) <= absolute + share * abs(theirs)
    unit = 10.0 ** -len(page.partition(".")[2]) if "." in page and "e" not in page else 0.0
    return abs(mine - theirs) <= 1.01 * unit


def agree(printed: str, page: str, kind: str) -> bool:
    """Whether the texts are equal, spaces apart, and the numbers agree as far as a block's kind asks for."""
    if [text.split() for text in NUMBER.split(printed)] != [text.split() for text in NUMBER.split(page)]:
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(page), strict=True)
    return all(numbers_agree(mine, theirs, kind) for mine, theirs in pairs)


def commands(block: Block) -> list[tuple[str, str]]:
    """(command, what the page says it prints) of a console block."""
    parts = re.split(r"^\$ (.*)\n", block.content, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def is_ours(command: str) -> bool:
    return command.startswith("python -m mnist_lightning ")


def new_outputs(lesson: Lesson) -> list[str | None]:
    """What each block of the English page should hold now; None where it stays as it is."""
    found: list[str | None] = []
    printed = ""
    for block in blocks(PAGES[0].read_text()):
        content = None
        if block.language in ("python", "py"):
            printed = lesson.run(block)
            if block.kind == "figure":
                lesson.draw_in_chinese(block)
        elif block.language == "text" and (block.kind == "mnist") == (lesson.source == "mnist"):
            content = printed
        elif block.language == "console" and lesson.source == "digits":
            pairs = [(line, lesson.command(line) if is_ours(line) else text) for line, text in commands(block)]
            content = "".join(f"$ {line}\n{text}" for line, text in pairs)
        found.append(content)
    return found


def write_outputs(page: Path, contents: list[str | None]) -> None:
    text = page.read_text()
    for block, content in reversed(list(zip(blocks(text), contents, strict=True))):
        if content is not None:
            start, end = block.span
            text = text[:start] + content + text[end:]
    page.write_text(text)


def run(mnist: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if mnist:
            shutil.copytree(mnist, Path(folder, "data"))
        lesson = Lesson(Path(folder), "mnist" if mnist else "digits")
        contents = new_outputs(lesson)
        for page in PAGES:
            write_outputs(page, contents)
        # Most figures show what a reader without a network gets.
        with_mnist = ("digits.png", "transfer-mnist.png")
        for made, kept in zip(("lesson", "lesson/zh-CN"), FIGURES, strict=True):
            for figure in sorted(Path(folder, made).glob("*.png")):
                if (figure.name in with_mnist) == (mnist is not None):
                    few_colours = Image.open(figure).convert("RGB").quantize(128)
                    few_colours.save(ROOT / "docs/images" / kept / figure.name, optimize=True)


def link_lines() -> None:
    """Writes into both pages the line on which each linked piece of code stands now."""
    for page in PAGES:

        def found(match: re.Match[str]) -> str:
            code, file, _ = match.groups()
            lines = [n for n, line in enumerate((ROOT / file).read_text().splitlines(), 1) if code in line]
            if len(lines) != 1:
                raise SystemExit(f"{page.name}: `{code}` stands on the lines {lines} of {file}, not on one")
            return f"[`{code}`](../{file}#L{lines[0]})"

        page.write_text(LINK.sub(found, page.read_text()))


def solution_last(fold: re.Match[str]) -> str:
    """A fold's prose, folded, and then its listings, which a notebook runs."""
    listings = "\n".join(listing[0] for listing in LISTING.finditer(fold[1]))
    if "```python" in listings:
        return listings
    return fold[0].replace(fold[1], LISTING.sub("", fold[1]).strip() + "\n\n") + "\n" + listings


def notebook(page: Path) -> str:
    """The notebook of a page, JSON: what the page prints and shows are outputs, what it folds are hidden cells."""
    text = DRAWN.sub(r"*\1*\n\n\3 \2\n", page.read_text())
    text = FOLD.sub(solution_last, text)
    cells: list[dict[str, Any]] = []
    place = 0
    for listing in LISTING.finditer(text):
        cells.append({"cell_type": "markdown", "metadata": {}, "source": text[place : listing.start()].strip()})
        place = listing.end()
        outputs: list[dict[str, Any]] = []
        if listing["printed"]:
            outputs.append({"name": "stdout", "output_type": "stream", "text": listing["printed"]})
        if listing["picture"]:
            png = base64.b64encode((page.parent / listing["picture"]).read_bytes()).decode()
            outputs.append({"data": {"image/png": png}, "metadata": {}, "output_type": "display_data"})
        hidden = {f"{part}_hidden": True for part in HIDDEN.get(listing["kind"], ("source",))}
        cells.append(code_cell(listing["code"].rstrip(), outputs, {"jupyter": hidden} if hidden else {}))
    cells.append({"cell_type": "markdown", "metadata": {}, "source": text[place:].strip()})
    cells.insert(1, code_cell(SETUP.rstrip(), [], {}))
    numbered = [{"id": f"cell-{n}", **cell} for n, cell in enumerate(cells) if cell["source"]]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": numbered, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def code_cell(code: str, outputs: list[dict[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    cell = {"cell_type": "code", "execution_count": None, "metadata": metadata}
    return {**cell, "outputs": outputs, "source": code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "links", "notebooks"])
    parser.add_argument("--mnist", metavar="DATA_DIR", help="folder that holds MNIST/raw")
    args = parser.parse_args()
    if args.what == "run":
        run(args.mnist)
    elif args.what == "links":
        link_lines()
    else:
        for page in PAGES:
            page.with_suffix(".ipynb").write_text(notebook(page))


if __name__ == "__main__":
    main()
