"""The lesson: its listings print what it says, its two pages have one code, its networks are the package's."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.lesson import (
    FIGURES,
    LINK,
    PAGES,
    ROOT,
    TOLERANCES,
    Block,
    Lesson,
    agree,
    blocks,
    commands,
    is_ours,
    notebook,
    sections,
)
from mnist_lightning import ConvNet

PAGE = PAGES[0].read_text()
COMPARED = tuple(f"## {number}." for number in range(6))  # what sections 0 to 5 print is compared in every run
# How the sections after them become short enough to run every time: what stands in a listing, and instead.
SHORTER = {
    "num_epochs = 5": "num_epochs = 1",
    "(0.003, 0.03)": "(0.003,)",
    "400 * 32": "2 * 32",
    "total_steps=400": "total_steps=2",
    "range(1317)": "range(48)",
    "val_part, 30": "val_part, 1",
    "range(3)": "range(1)",
    "ConvNet, 150": "ConvNet, 1",
    "(512, 10), 300": "(512, 10), 1",
    "own_val_loader, 10": "own_val_loader, 1",
    "val_loader, 5,": "val_loader, 1,",
}

# matplotlib converts tensors through numpy, and torch lacks numpy 2's new arguments.
pytestmark = pytest.mark.filterwarnings("ignore:__array_(_|wrap__):DeprecationWarning")


def check(lesson: Lesson, text: str, chinese_figures: bool = False) -> int:
    """Runs the listings, compares the outputs, and returns how many outputs there were."""
    printed, compared = "", 0
    for block in blocks(text):
        if block.language in ("python", "py"):
            printed = lesson.run(block)
            if chinese_figures and block.kind == "figure":
                lesson.draw_in_chinese(block)
        elif block.language == "text" and block.kind != "mnist":
            assert agree(printed, block.content, block.kind), f"printed:\n{printed}\nthe page says:\n{block.content}"
            compared += 1
    return compared


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lesson]:
    """One session of a reader: sections 0 to 5 as they are, the others shortened."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("MPLBACKEND", "Agg")
    lesson = Lesson(tmp_path_factory.mktemp("lesson"))
    assert check(lesson, "".join(text for text in sections(PAGE) if text.startswith(COMPARED))) > 20
    yield lesson
    monkeypatch.undo()


@pytest.fixture(scope="module")
def shortened(lesson: Lesson) -> Lesson:
    rest, unused = "".join(text for text in sections(PAGE) if not text.startswith(COMPARED)), set(SHORTER)
    for block in blocks(rest):
        if block.language in ("python", "py"):
            content = block.content
            for long, short in SHORTER.items():
                if long in content:
                    content = content.replace(long, short)
                    unused.discard(long)
            lesson.run(block._replace(content=content))
    assert not unused
    return lesson


def test_listings_up_to_the_optimizer_print_what_the_page_says(lesson: Lesson) -> None:
    assert (lesson.folder / "lesson/sliding.png").exists()


def test_all_later_listings_run(shortened: Lesson) -> None:
    assert (shortened.folder / "lesson/own.pth").exists()


def test_words_of_the_chinese_figures_are_chinese(lesson: Lesson) -> None:
    figures = [block for block in blocks(PAGE) if block.kind == "figure"]
    (words,) = (block for block in blocks(PAGES[1].read_text()) if block.kind == "words")
    assert all(word in PAGE for word in re.findall(r'"([^"]+)": "', words.content))
    lesson.draw_in_chinese(next(block for block in figures if 'save("sliding")' in block.content))
    assert (lesson.folder / "lesson/zh-CN/sliding.png").exists()


def test_network_of_the_lesson_gives_the_outputs_of_the_package(lesson: Lesson) -> None:
    model = lesson.names["ConvNet"]()
    package = ConvNet()
    package.load_state_dict(model.state_dict())
    bytes_ = lesson.names["raw"].data[:32].unsqueeze(1)  # the package normalises inside the model
    normalised = torch.stack([lesson.names["transform"](image.numpy()) for image in bytes_[:, 0]])
    with torch.no_grad():
        torch.testing.assert_close(package(bytes_), model(normalised), atol=1e-5, rtol=0)


def test_lightning_trains_the_weights_of_the_plain_loop(shortened: Lesson) -> None:
    loop, lightning = shortened.names["model"].state_dict(), shortened.names["lightning_model"].net.state_dict()
    assert loop.keys() == lightning.keys()
    for name in loop:
        torch.testing.assert_close(lightning[name], loop[name], atol=1e-6, rtol=0)


def test_images_and_split_are_the_packages(lesson: Lesson) -> None:
    from mnist_lightning import MNISTDataModule
    from mnist_lightning.sources import load_digits

    train, test = load_digits()
    assert torch.equal(lesson.names["full_train"].data, train.images[:, 0])
    assert torch.equal(lesson.names["test_set"].targets, test.labels)
    data = MNISTDataModule(source="digits")
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    mine = [lesson.names["full_train"].targets[k] for k in lesson.names["val_set"].indices]
    assert sorted(torch.stack(mine).tolist()) == sorted(labels.tolist())


@pytest.mark.slow
def test_listings_and_commands_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    whole, ran = Lesson(tmp_path), 0
    assert check(whole, PAGE, chinese_figures=True) > 50
    for block in blocks(PAGE):
        if block.language == "console":
            for line, expected in commands(block):
                if is_ours(line):  # section 9 has saved the weights that some read
                    printed = whole.command(line)
                    assert agree(printed, expected, "rough"), f"printed:\n{printed}\nthe page says:\n{expected}"
                    ran += 1
                else:
                    assert line.split()[0] in ("git", "cd", "python", "source", "pip"), line
    assert ran == 4


@pytest.mark.slow
def test_listings_on_mnist_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "data/MNIST/raw").is_dir():
        pytest.skip("needs MNIST's files in data/")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (tmp_path / "data").symlink_to(ROOT / "data")
    on_mnist, printed, kind, compared = Lesson(tmp_path, "mnist"), "", "", 0
    for block in blocks(PAGE):
        if block.language in ("python", "py"):
            printed = on_mnist.run(block)
        elif block.kind == "mnist":
            # As roughly as the digits' output before it.
            tolerance = "rough" if kind == "rough" else "trained"
            assert agree(printed, block.content, tolerance), f"{printed}\nthe page says:\n{block.content}"
            compared += 1
        elif block.language == "text":
            kind = block.kind
    assert compared > 8


def code(block: Block) -> str:
    """Without comments, docstrings and empty lines, which may be translated."""
    tree = ast.parse(block.content)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str) and len(body) > 1:
                del body[0]
    return ast.unparse(tree)


def test_both_languages_have_the_same_code_and_outputs() -> None:
    english, chinese = (blocks(page.read_text()) for page in PAGES)
    assert [(b.language, b.kind) for b in english] == [(b.language, b.kind) for b in chinese]
    for ours, theirs in zip(english, chinese, strict=True):
        if ours.kind == "words":
            continue
        if ours.language in ("python", "py"):
            assert code(ours) == code(theirs)
        else:
            assert ours.content == theirs.content


def test_both_languages_show_the_same_figures_and_link_the_same_code() -> None:
    english, chinese = (page.read_text() for page in PAGES)
    assert LINK.findall(english) == LINK.findall(chinese)
    ours, theirs = (re.findall(rf"\(images/{FIGURES[k]}/([\w-]+)[.]png\)", (english, chinese)[k]) for k in (0, 1))
    assert ours == theirs
    for name in ours:
        assert all((ROOT / "docs/images" / folder / f"{name}.png").exists() for folder in FIGURES)
        assert f'save("{name}")' in english or f'save(f"{re.sub("-(digits|mnist)$", "-{SOURCE}", name)}")' in english


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_package_lead_to_the_line_they_name(page: Path) -> None:
    links = LINK.findall(page.read_text())
    assert len(links) > 15
    for expected, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert expected in line, f"{file}:{number} is {line!r}; mend it with: python -m benchmarks.lesson links"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebooks_are_made_of_the_pages(page: Path) -> None:
    made = notebook(page)
    assert page.with_suffix(".ipynb").read_text() == made, "run: python -m benchmarks.lesson notebooks"
    cells = [cell for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    listings = [block.content.rstrip() for block in blocks(page.read_text()) if block.language in ("python", "py")]
    assert [cell["source"] for cell in cells[1:]] == listings
    pictures = [output for cell in cells for output in cell["outputs"] if "data" in output]
    assert len(pictures) == page.read_text().count("python figure")


@pytest.mark.slow
def test_notebook_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept, run = (nbformat.read(PAGES[0].with_suffix(".ipynb"), as_version=4) for _ in range(2))
    (tmp_path / "docs").mkdir()
    nbclient.NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    assert (tmp_path / "lesson/transfer-digits.png").exists()  # in the project's folder, which holds data/
    for ours, theirs in zip(kept.cells, run.cells, strict=True):
        for expected in [output.text for output in ours.get("outputs", []) if output.output_type == "stream"]:
            printed = "".join(output.text for output in theirs.outputs if output.get("name") == "stdout")
            assert agree(printed, expected, "rough"), printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tolerance_of_the_tests_is_the_one_that_the_page_states(page: Path) -> None:
    assert TOLERANCES == {"trained": (0.05, 0.03), "rough": (0.1, 0.2)}
    assert re.search(r"\b3 .*0\.05.*0\.1.*20 ?%", page.read_text().split("## 0")[0].replace("\n", " "))


def test_numbers_apart_are_noticed() -> None:
    assert agree("loss 0.30, 83 steps", "loss 0.34, 83 steps", "trained")
    assert not agree("loss 0.30", "loss 0.40", "trained")
    assert agree("58.0 % of 12", "67.5 % of 12", "rough") and not agree("50.0 % of 12", "67.5 % of 12", "rough")
    assert not agree("loss 0.30, 83 steps", "loss 0.30, 84 steps", "trained")
    assert not agree("mean 0.1593", "mean 0.1307", "")
    assert not agree("train loss 0.3", "val loss 0.3", "trained")
