"""The page: what drawings and pictures give, and the page itself in a headless browser."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import lightning
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from running import Fit
from torch import nn

from mnist_lightning import ConvNet, load_model
from mnist_lightning.commands.cli import run
from mnist_lightning.commands.demo import MAX_BYTES, bars, sent_file, show
from mnist_lightning.photos.ink import ink
from mnist_lightning.photos.reading import read_squares
from mnist_lightning.runs.saved import MNIST_EXAMPLE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[2]
DIGITS = list("0123456789")
STROKES = {  # shares of the canvas
    "7": [(0.35, 0.25), (0.65, 0.25), (0.45, 0.8)],
    "1": [(0.38, 0.38), (0.54, 0.2), (0.54, 0.8)],
}


def drawing(points: Sequence[Any]) -> Image.Image:
    """Black on transparent, as the canvas gives it."""
    image = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(image).line([(400 * x, 400 * y) for x, y in points], "black", 25)
    return image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a ConvNet that was taught the two digits of STROKES, drawn a little differently each time."""
    torch.manual_seed(0)
    model, rng = ConvNet(), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        drawn = {digit: [np.add(point, rng.normal(0, 0.03, 2)) for point in STROKES[digit]] for digit in STROKES}
        images = torch.stack([torch.from_numpy(ink(drawing(points)).image)[None] for points in drawn.values()])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.tensor([int(digit) for digit in drawn])).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("taught") / "model.ckpt"
    content: dict[str, Any] = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    model.on_save_checkpoint(content)
    torch.save({"pytorch-lightning_version": lightning.__version__, **content}, path)
    return path


def as_file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "sent").write_bytes(content)
        return tmp_path / "sent"

    return write


def pictures_in(shown: list[str]) -> list[Image.Image | None]:
    """What is shown below and beside the answer."""
    encoded = [re.findall(r"base64,(.*?)'", text) for text in shown]
    return [Image.open(io.BytesIO(base64.b64decode(found[0]))) if found else None for found in encoded]


def texts(kind: str, page: str) -> list[str]:
    return re.findall(rf"<\w+ class='{kind} ?\w*'>(.*?)</", page)


@pytest.mark.parametrize("digit", STROKES)
def test_drawing_gives_probabilities_picture_and_feature_maps(
    digit: str, checkpoint: Path, written: Callable[[bytes], Path]
) -> None:
    file = written(as_file(drawing(STROKES[digit])))
    answer, *shown = show(load_model(checkpoint), DIGITS, MNIST_EXAMPLE, file)
    percents = [float(text.removesuffix(" %")) for text in texts("percent", answer)]
    assert texts("answer", answer) == [digit] and max(DIGITS, key=lambda name: percents[int(name)]) == digit
    assert sum(percents) == pytest.approx(100, abs=0.5)
    seen, conv1, conv2 = map(np.asarray, pictures_in(shown))
    assert np.array_equal(seen[..., 0], ink(drawing(STROKES[digit])).image)
    assert conv1.shape[2] == conv2.shape[2] == 3 and conv1.std() > 0


def test_layer_that_the_model_does_not_use_has_no_feature_maps(written: Callable[[bytes], Path]) -> None:
    model = ConvNet().eval()
    model.spare = nn.Conv2d(1, 1, 1)
    *_, conv2, spare = pictures_in(show(model, DIGITS, MNIST_EXAMPLE, written(as_file(drawing(STROKES["7"])))))
    assert conv2 is not None and spare is None


@pytest.mark.parametrize(("drawn", "reason"), [
    (None, ""),
    (as_file(Image.new("RGBA", (400, 400))), "no digit: the picture is transparent all over"),
    (b"no picture", "no picture that Pillow reads: save it as PNG or JPEG"),
    (as_file(drawing(STROKES["7"]))[:200], "can&#x27;t be read: .*"),
    (as_file(drawing(STROKES["7"]).resize((4001, 10))), "too large for a drawing: more than 4,000 pixels a side"),
], ids=["nothing", "empty", "no picture", "damaged", "too large"])  # fmt: skip
def test_what_shows_no_digit_gets_the_reason_for_an_answer(
    drawn: bytes | None, reason: str, written: Callable[[bytes], Path]
) -> None:
    answer, *shown = show(ConvNet().eval(), DIGITS, MNIST_EXAMPLE, None if drawn is None else written(drawn))
    assert texts("answer", answer) == ["?"] and shown == [""] * 3
    assert re.fullmatch(reason, texts("confidence", answer)[0])


def test_bars_stand_in_the_order_of_the_classes_under_their_names() -> None:
    page = bars([0.2, 0.7, 0.1], ["b", "<i>", "a"])
    assert re.findall(r"<span>(.*?)</span>", page) == ["b", "&lt;i&gt;", "a"]
    assert re.findall(r"width: (.*?)%", page) == ["20.0", "70.0", "10.0"]
    assert texts("answer", page) == ["&lt;i&gt;"]


class Halves(ConvNet):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("expected 14 rows")


@pytest.mark.parametrize(("model", "more", "got"), [
    (ConvNet(), {"example_input": {"shape": [3, 40, 40], "dtype": "float32"}}, "float32 images (3, 40, 40)"),
    (Halves(), {}, "RuntimeError: expected 14 rows"),
], ids=["recorded", "tried"])  # fmt: skip
def test_model_of_other_images_is_refused(
    model: ConvNet, more: dict[str, Any], got: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "installed")
    content = {**torch.load(checkpoint, weights_only=True), "hyper_parameters": dict(model.hparams), **more}
    model.on_save_checkpoint(content)
    torch.save(content, tmp_path / "other.ckpt")
    assert run(["demo", "--ckpt_path", str(tmp_path / "other.ckpt")]) == 2
    said = capsys.readouterr().err
    assert "uint8 images (1, 28, 28), as MNIST has them, or (3, S, S), as ImageFolder has them" in said
    assert got in said and said.count("\n") == 3


class Served(NamedTuple):
    address: str
    folder: Path  # for Gradio's files
    process: "subprocess.Popen[str]"
    errors: Path


@contextmanager
def serving(checkpoint: Path, temporary: Path) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="the extra `demo` isn't installed: pip install '.[demo]'")
    args = ["demo", "--ckpt_path", str(checkpoint), "--browser", "false"]
    command = [sys.executable, "-m", "mnist_lightning", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    errors = temporary / "stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as server,
    ):
        said = next(line for line in iter(server.stdout or ()) if "http://" in line)
        address = next(word for word in said.split() if word.startswith("http://"))
        yield Served(address, next(temporary.glob("mnist_lightning-*")), server, errors)
        server.terminate()


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(checkpoint, tmp_path_factory.mktemp("temporary")) as page:
        yield page


def request(url: str, body: bytes | None = None, **headers: str) -> bytes:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with urlopen(Request(url, body, headers), timeout=60) as answer:
        return answer.read()


def send(address: str, content: bytes, drawn: bool = True) -> str:
    """Sends a drawing or a picture as the browser does, and asks for what is shown of it."""
    head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="composite.png"\r\n\r\n'
    body, kind = head + content + b"\r\n--cut--\r\n", "multipart/form-data; boundary=cut"
    path = json.loads(request(f"{address}gradio_api/upload", body, Content_Type=kind))[0]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return answer_to(address, {"background": None, "layers": [], "composite": file} if drawn else file)


def answer_to(address: str, sent: Any) -> str:
    """What is shown of what a browser, or a program, says that it has sent."""
    call = f"{address}gradio_api/call/answered"
    data = json.dumps({"data": [sent]}).encode()
    event = json.loads(request(call, data, Content_Type="application/json"))["event_id"]
    return request(f"{call}/{event}").decode()


@pytest.mark.slow
def test_each_of_many_people_at_once_gets_an_answer(served: Served) -> None:
    drawn = {digit: as_file(drawing(points)) for digit, points in STROKES.items()}
    people = 10 * list(STROKES)
    with ThreadPoolExecutor(len(people)) as pool:
        answers = list(pool.map(lambda digit: send(served.address, drawn[digit]), people))
    assert [texts("answer", answer) for answer in answers] == [[digit] for digit in people]
    assert texts("answer", send(served.address, b"no picture")) == ["?"]
    assert texts("answer", answer_to(served.address, None)) == ["?"]  # of what else is odd Gradio says so itself
    assert served.errors.read_text() == ""


@pytest.mark.slow
def test_uploaded_picture_is_classified_under_the_names_of_its_classes(pictures_fit: Fit, tmp_path: Path) -> None:
    best = pictures_fit.root / "lightning_logs/ResNet18/version_0/checkpoints/best.ckpt"
    photo = pictures_fit.root / "photos/bees/10.jpg"
    with serving(best, tmp_path) as page:
        shown = send(page.address, photo.read_bytes(), drawn=False)
        refused = send(page.address, b"no picture", drawn=False)
        assert page.errors.read_text() == ""
    answers = load_model(best).classify(photo)
    assert texts("answer", shown) == [max(answers, key=answers.__getitem__)]
    assert re.findall(r"<span>(.*?)</span>", shown) == ["ants", "bees"]
    assert texts("percent", shown) == [f"{100 * answers[name]:.1f} %" for name in ("ants", "bees")]
    seen, *maps = pictures_in(shown.split("<img")[1:])
    assert np.array_equal(np.asarray(seen), read_squares([photo], 32)[0][0].permute(1, 2, 0)) and len(maps) == 5
    assert texts("answer", refused) == ["?"]
    assert texts("confidence", refused) == ["no picture that Pillow reads: save it as PNG or JPEG"]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com"])
def test_page_is_for_this_machine_by_its_own_name(host: str, served: Served) -> None:
    with pytest.raises(HTTPError, match="400"):
        request(served.address, Host=host)
    assert request(served.address, Host=f"localhost:{urlsplit(served.address).port}")


@pytest.mark.slow
def test_what_is_too_large_for_a_drawing_is_not_taken(served: Served) -> None:
    with pytest.raises(HTTPError, match="413|400"):
        send(served.address, bytes(MAX_BYTES + 1))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_digit_drawn_in_a_browser_is_classified(served: Served) -> None:
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install playwright")
    assert served.address.startswith("http://127.0.0.1:")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.address)
        canvas = page.locator("canvas").first
        canvas.wait_for()
        page.wait_for_load_state("networkidle")
        playwright.expect(page.locator(".answer")).to_have_text("?")
        box = canvas.bounding_box()
        side = 0.9 * min(box["width"], box["height"])
        left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
        for i, (x, y) in enumerate(STROKES["7"]):
            page.mouse.move(left + x * side, top + y * side, steps=12)
            if i == 0:
                page.mouse.down()
        page.mouse.up()
        playwright.expect(page.locator(".answer")).to_have_text("7", timeout=60_000)
        pictures = [picture.bounding_box() for picture in page.locator(".picture img").all()]
        assert len(pictures) == 3  # what the network sees, conv1, conv2
        for caption in page.get_by_text(re.compile("Feature maps|network sees")).all():
            bottom = caption.bounding_box()["y"] + caption.bounding_box()["height"]
            assert all(picture["y"] >= bottom or picture["y"] + picture["height"] < bottom for picture in pictures)
        assert page.evaluate("document.documentElement.scrollHeight") <= 900  # all of it is in view
        browser.close()
    outside = [url for url in asked if not re.match(r"(http://127\.0\.0\.1|data:|blob:)", url)]
    assert not outside  # it works without a network


def test_only_what_was_sent_is_read(tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()
    for file in (sent / "a", tmp_path / "b"):
        file.write_bytes(b"drawn")
    (sent / "link").symlink_to(tmp_path / "b")
    paths = [sent / "a", tmp_path / "b", sent / "../b", sent / "link", sent, sent / "none", sent / ("a" * 300), "\0"]
    assert [sent_file({"path": str(path)}, sent) for path in paths] == [sent / "a", *7 * [None]]
    assert [sent_file(odd, sent) for odd in (None, "a", {}, {"path": 3}, [str(sent / "a")])] == 5 * [None]


@pytest.mark.slow
def test_files_of_the_page_are_private_and_go_with_it(served: Served) -> None:
    assert served.folder.stat().st_mode & 0o777 == 0o700
    send(served.address, as_file(drawing(STROKES["7"])))
    assert not [path for path in served.folder.parent.glob("*") if path not in (served.folder, served.errors)]
    served.process.terminate()
    assert served.process.wait(60) == 128 + signal.SIGTERM and not served.folder.exists()
