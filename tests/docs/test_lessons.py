"""The lesson: its listings print what it says, its two pages have one code, its networks are the package's."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.lesson import (
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
SLOW_SECTIONS = ("## 9", "## 10", "## 11")  # they pretrain and use a ResNet18: about a minute

# matplotlib converts tensors through numpy, and torch lacks numpy 2's new arguments.
pytestmark = pytest.mark.filterwarnings("ignore:__array_(_|wrap__):DeprecationWarning")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lesson]:
    """One session of a reader, in which the tests run the lesson's listings in order."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("MPLBACKEND", "Agg")
    yield Lesson(tmp_path_factory.mktemp("lesson"))
    monkeypatch.undo()


def part(slow: bool) -> str:
    return "".join(text for text in sections(PAGE) if text.startswith(SLOW_SECTIONS) == slow)


def check(lesson: Lesson, text: str) -> int:
    """Runs the listings, compares the outputs, and returns how many outputs there were."""
    printed, compared = "", 0
    for block in blocks(text):
        if block.language in ("python", "py"):
            printed = lesson.run(block)
        elif block.language == "text" and block.kind != "mnist":
            assert agree(printed, block.content, block.kind), f"printed:\n{printed}\nthe page says:\n{block.content}"
            compared += 1
    return compared


def run_up_to_lightning(lesson: Lesson) -> None:
    """For a test that runs alone; otherwise the first test has done it."""
    if "lightning_model" not in lesson.names:
        check(lesson, part(slow=False))


def test_listings_up_to_lightning_print_what_the_page_says(lesson: Lesson) -> None:
    assert check(lesson, part(slow=False)) > 30


def test_network_of_the_lesson_gives_the_outputs_of_the_package(lesson: Lesson) -> None:
    run_up_to_lightning(lesson)
    model = lesson.names["ConvNet"]()
    package = ConvNet()
    package.load_state_dict(model.state_dict())
    bytes_ = lesson.names["raw"].data[:32].unsqueeze(1)  # the package normalises inside the model
    normalised = torch.stack([lesson.names["full_train"][k][0] for k in range(32)])
    with torch.no_grad():
        torch.testing.assert_close(package(bytes_), model(normalised), atol=1e-5, rtol=0)


def test_lightning_trains_the_weights_of_the_plain_loop(lesson: Lesson) -> None:
    run_up_to_lightning(lesson)
    loop, lightning = lesson.names["model"].state_dict(), lesson.names["lightning_model"].net.state_dict()
    assert loop.keys() == lightning.keys()
    for name in loop:
        torch.testing.assert_close(lightning[name], loop[name], atol=1e-6, rtol=0)


def test_images_and_split_are_the_packages(lesson: Lesson) -> None:
    from mnist_lightning import MNISTDataModule
    from mnist_lightning.sources import load_digits

    run_up_to_lightning(lesson)
    train, test = load_digits()
    assert torch.equal(lesson.names["full_train"].data, train.images[:, 0])
    assert torch.equal(lesson.names["test_set"].targets, test.labels)
    data = MNISTDataModule(source="digits")
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    mine = [lesson.names["full_train"].targets[k] for k in lesson.names["val_set"].indices]
    assert sorted(torch.stack(mine).tolist()) == sorted(labels.tolist())


@pytest.mark.slow
def test_listings_of_fine_tuning_print_what_the_page_says(lesson: Lesson) -> None:
    run_up_to_lightning(lesson)
    assert check(lesson, part(slow=True)) > 12


@pytest.mark.slow
def test_commands_print_what_the_page_says(lesson: Lesson) -> None:
    if not (lesson.folder / "resnet18-pretrained.pth").exists():  # section 9 saves it, its command reads it
        run_up_to_lightning(lesson)
        check(lesson, part(slow=True))
    ran = 0
    for block in blocks(PAGE):
        if block.language == "console":
            for line, expected in commands(block):
                if is_ours(line):
                    printed = lesson.command(line)
                    assert agree(printed, expected, "rough"), f"printed:\n{printed}\nthe page says:\n{expected}"
                    ran += 1
                else:
                    assert line.split()[0] in ("git", "cd", "python", "source", "pip"), line
    assert ran == 3


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
        if ours.language in ("python", "py"):
            assert code(ours) == code(theirs)
        else:
            assert ours.content == theirs.content


def test_both_languages_show_the_same_figures_and_link_the_same_code() -> None:
    english, chinese = (page.read_text() for page in PAGES)
    for pattern in (re.compile(r"images/[\w-]+\.png"), LINK):
        assert pattern.findall(english) == pattern.findall(chinese)
    for figure in re.findall(r"images/[\w-]+\.png", english):
        assert (ROOT / "docs" / figure).exists()
        name = re.sub("-(digits|mnist)[.]", "-{SOURCE}.", Path(figure).name)
        assert f'"{name}")' in english or f'"{Path(figure).name}")' in english


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_package_lead_to_the_line_they_name(page: Path) -> None:
    links = LINK.findall(page.read_text())
    assert len(links) > 15
    for expected, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert expected in line, f"{file}:{number} is {line!r}; mend it with: python -m benchmarks.lesson links"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebooks_are_what_jupytext_makes_of_the_pages(page: Path) -> None:
    pytest.importorskip("jupytext")
    assert page.with_suffix(".ipynb").read_text() == notebook(page), "run: python -m benchmarks.lesson notebooks"


@pytest.mark.slow
def test_notebook_runs_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = nbformat.read(PAGES[0].with_suffix(".ipynb"), as_version=4)
    nbclient.NotebookClient(cells, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "tutorial-transfer-digits.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tolerance_of_the_tests_is_the_one_that_the_page_states(page: Path) -> None:
    assert TOLERANCES == {"trained": (0.05, 0.03), "rough": (0.1, 0.2)}
    assert re.search(r"\b3 .*0\.05.*(fifth|五分之一)", page.read_text().split("## 0")[0].replace("\n", " "))


def test_numbers_apart_are_noticed() -> None:
    assert agree("loss 0.30, 83 steps", "loss 0.34, 83 steps", "trained")
    assert not agree("loss 0.30", "loss 0.40", "trained")
    assert agree("58.0 % of 12", "67.5 % of 12", "rough") and not agree("50.0 % of 12", "67.5 % of 12", "rough")
    assert not agree("loss 0.30, 83 steps", "loss 0.30, 84 steps", "trained")
    assert not agree("mean 0.1593", "mean 0.1307", "")
    assert not agree("train loss 0.3", "val loss 0.3", "trained")
