"""The documents can't drift: their Python prints what they say, their commands run, their links lead somewhere."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnist_lightning.commands.cli import run

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TUTORIALS = ["docs/tutorial.md", "docs/tutorial.zh-CN.md", "docs/make-it-yours.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = ["--trainer.limit_train_batches", "3", "--trainer.max_epochs", "1"]


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return BLOCK.findall((ROOT / document).read_text())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    for path in ("photos/1.png", "photo.png"):
        Image.new("L", (100, 100), 255).save(path)
        with Image.open(path) as picture:
            picture.paste(0, (45, 20, 52, 80))
            picture.save(path)
    return tmp_path


@pytest.mark.parametrize("document", [name for name in TUTORIALS if name != "docs/make-it-yours.md"])
def test_python_prints_what_the_tutorial_says(document: str, here: Path) -> None:
    names: dict[str, object] = {}
    printed = ""
    checked = 0
    for language, content in blocks(document):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(content, names)
            printed = out.getvalue()
        elif language == "text":
            assert printed == content
            checked += 1
    assert checked >= 8


def shortened(command: str) -> list[str]:
    """The arguments of `python -m mnist_lightning`, cut so that they take seconds and no network."""
    args = command.split()[3:]
    if args[0] == "fit" and "--ckpt_path" not in args:
        args += SHORT
        args += [] if "--data" in args else ["--data.source", "digits"]
        if "ResNet18" in args or any("resnet18" in arg for arg in args):
            args += ["--model.weights", "none", "--model.image_size", "28"]
    return args


@pytest.mark.parametrize("document", TUTORIALS)
def test_commands_of_the_tutorials_run(document: str, here: Path) -> None:
    ran = 0
    for language, content in blocks(document):
        if language == "python" and "class MLP" in content:
            (here / "mine.py").write_text(content)
        for line in content.splitlines() if not language else []:
            if line.startswith("python -m mnist_lightning ") and "help" not in line:
                assert run(shortened(line)) == 0, line
                ran += 1
    assert ran >= 3


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md", "docs/fine-tuning.md"])
def test_commands_of_the_readme_run(document: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, "unused.pt")
    assert run(["fit", *SHORT, "--data.source", "digits"]) == 0
    slow = ("torchrun", "demo", "--lr_find", "for lr", "ResNet18-digits")
    for language, content in blocks(document):
        for line in content.splitlines() if not language else []:
            command = line.split("&&")[-1].strip()
            if not command.startswith("python -m mnist_lightning ") or any(word in command for word in slow):
                continue
            if "export" in command and importlib.util.find_spec("onnxruntime") is None:
                continue
            args = [arg.replace("ConvNet/version_0", "ConvNet-digits/version_0") for arg in shortened(command)]
            if args[0] == "predict" and "Photos" in args:
                args = [arg.replace("best", "last") for arg in args]
            assert run(args) == 0, command


def anchors(path: Path) -> set[str]:
    """Of the headings, as code hosts make them."""
    text = BLOCK.sub("", path.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text())):
        if re.match(r"https?://[\w.-]+(/\S*)?$", link):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}"
