"""The documents can't drift: their commands exist, the README's run, their links lead somewhere.

The lesson's listings are in test_lessons.py.
"""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mnist_lightning.commands.cli import run
from mnist_lightning.commands.demo import demo
from mnist_lightning.commands.parser import Parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
READMES = ["README.md", "README.zh-CN.md"]
WITH_PYTHON = ["docs/usage.md", "docs/fine-tuning.md"]
SHORT = ["--trainer.limit_train_batches", "3", "--trainer.max_epochs", "1", "--data.source", "digits"]
SMALL = ["--model.weights", "none", "--model.image_size", "28"]


def text(document: str) -> str:
    return (ROOT / document).read_text()


def commands(document: str) -> list[list[str]]:
    """The words after `python -m mnist_lightning` (or torchrun's) of the lines in blocks without a language."""
    plain = "".join(content for language, content in BLOCK.findall(text(document)) if not language)
    found = [re.search(r"-m mnist_lightning (\w+ .*)", line.partition("; done")[0]) for line in plain.splitlines()]
    return [match[1].replace("$lr", "0.01").replace("'", "").split() for match in found if match]


def pythons(document: str) -> list[str]:
    return [content for language, content in BLOCK.findall(text(document)) if language == "python"]


@pytest.fixture
def here(convnet: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, two photos, and two runs that have the paths which the documents name."""
    monkeypatch.syspath_prepend(str(folder))
    Path("configs").symlink_to(ROOT / "configs")
    Path("photos").mkdir()
    photo = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(photo).line([(48, 20), (48, 80)], 0, 8)
    photo.save("photo.png")
    photo.save("photos/1.png")
    Path("lightning_logs/ConvNet").symlink_to("ConvNet-digits")
    # A ResNet18 takes long to train, and the parser looks at the path alone.
    Path("lightning_logs/ResNet18-digits").symlink_to("ConvNet-digits")
    return folder


def test_commands_are_accepted(here: Path, capsys: pytest.CaptureFixture) -> None:
    """By the parser, with their options, classes and config files: it prints what it has understood."""
    own = [block for block in pythons("docs/make-it-yours.md") if "class " in block]
    (here / "mine.py").write_text("\n".join(own))
    checked = set()
    for document in DOCUMENTS:
        for name, *options in commands(document):
            if (name, *options) in checked:
                continue
            checked.add((name, *options))
            if name == "demo":
                parser = Parser()
                parser.add_function_arguments(demo)
                parser.parse_args(options)
            elif name != "export" and not any(option.endswith("help") for option in options):
                with pytest.raises(SystemExit) as ended:
                    pytest.fail(f"{document}: {name} {options}: {run([name, *options, '--print_config'])}")
                assert ended.value.code in (0, None)
                assert "class_path" in capsys.readouterr().out
    assert len(checked) > 30


@pytest.mark.slow
def test_commands_of_the_readme_run(here: Path) -> None:
    (here / "lightning_logs/ConvNet").unlink()
    (here / "lightning_logs/ResNet18-digits").unlink()
    ran = 0
    for name, *options in commands("README.md"):
        if name == "demo" or (name == "export" and importlib.util.find_spec("onnxruntime") is None):
            continue
        if "ImageFolder" in options:  # needs pictures by class; tests/photos/test_image_folder.py has them
            continue
        if name == "fit" and "--ckpt_path" not in options:
            options += SHORT
            if any("resnet18" in option.lower() for option in options) and "--model.weights" not in options:
                options += SMALL
        assert run([name, *options]) == 0, options
        ran += 1
    assert ran > 8


def test_readmes_have_the_same_commands() -> None:
    english, chinese = ([content for language, content in BLOCK.findall(text(readme))] for readme in READMES)
    assert english == chinese


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_runs(document: str, here: Path, mnist_dir: str) -> None:
    """For an epoch, on the small MNIST files; what needs a package that isn't installed is left out."""
    ran = 0
    for block in pythons(document):
        needed = re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
        if any(importlib.util.find_spec(name) is None for name in needed):
            continue
        if "model.onnx" in block:
            assert run(["export", "--ckpt_path", "best", "--output", "model.onnx"]) == 0
        short = re.sub(r"max_epochs=\d+", "max_epochs=1, logger=False, accelerator='cpu'", block)
        short = short.replace("MNISTDataModule()", "MNISTDataModule(val_size=0.1)")
        short = short.replace('max_epochs", "3"', 'max_epochs", "1"')
        exec(short, {"__name__": "document"})
        ran += 1
    assert ran


def test_layout_names_the_folders_of_the_package_and_the_files_of_its_root() -> None:
    folders = {path.parent.name for path in ROOT.glob("mnist_lightning/*/__init__.py")}
    for readme in READMES:
        rows = re.findall(r"^\| (`\w+/.*?) \|(.*)\|$", text(readme), re.MULTILINE)
        named = [name for cell, _ in rows for name in re.findall(r"`([\w/]+)/`", cell)]
        assert {name.partition("/")[2] for name in named if name.startswith("mnist_lightning/")} == folders
        assert all((ROOT / name).is_dir() for name in named)
        files = re.findall(r"`(\w+\.py)`", rows[0][1])
        assert len(files) == 5
        assert all((ROOT / "mnist_lightning" / file).is_file() for file in files)


def test_tour_names_every_file_of_the_package() -> None:
    files = {path.name for path in ROOT.glob("mnist_lightning/**/*.py")} - {"__init__.py"}
    assert files <= set(re.findall(r"\w+\.py", text("docs/tour.md")))


def test_ci_finds_the_test_command_in_the_readme() -> None:
    assert re.search(r"^pip install -r requirements.txt && python -m pytest$", text("README.md"), re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Of the headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text())):
        if re.match(r"https?://[\w.-]+(/\S*)?$", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
