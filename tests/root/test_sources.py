"""Downloading and reading: right bytes or a UserError, on any network and after any crash."""

import errno
import gzip
import hashlib
import os
import random
import re
import socket
import stat
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from sklearn.datasets import load_digits as sklearn_digits
from torchvision.datasets import MNIST
from torchvision.models import ResNet18_Weights

from mnist_lightning import files, sources
from mnist_lightning.errors import UserError
from mnist_lightning.sources import Digits, imagenet_weights, load_digits, load_mnist

IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture
def mnist(mnist_dir: str, mirror: str, idx_contents: dict[str, bytes], idx_packed: dict[str, bytes]) -> SimpleNamespace:
    """The four intact .gz files in `raw_dir`, what is in them, and a mirror that has them, too."""
    raw_dir = Path(mnist_dir) / "MNIST" / "raw"
    return SimpleNamespace(dir=mnist_dir, raw_dir=raw_dir, mirror=mirror, contents=idx_contents, packed=idx_packed)


@pytest.fixture
def weights(server: Any, tmp_path: Path, monkeypatch: MonkeyPatch) -> SimpleNamespace:
    """What stands for ResNet18's weights: on `server`, and not yet downloaded."""

    def load(address: str = server.url) -> Path:
        monkeypatch.setattr(sources, "IMAGENET_URL", f"{address}/resnet18.pth")
        return imagenet_weights()

    body = server.answers["/resnet18.pth"] = random.Random(0).randbytes(5000)
    monkeypatch.setattr(sources, "IMAGENET_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return SimpleNamespace(path=folder / "resnet18.pth", body=body, url=f"{server.url}/resnet18.pth", load=load)


@pytest.fixture(params=["MNIST", "weights"])
def missing(request: pytest.FixtureRequest, mnist: Any, server: Any) -> SimpleNamespace:
    """A file that is on `server`, and not yet downloaded: one of MNIST's, or the weights."""
    if request.param == "weights":
        return request.getfixturevalue("weights")

    def load(address: str = f"{server.url}/mnist") -> Digits:
        return load_mnist(mnist.dir, [address])

    path = mnist.raw_dir / f"{LABELS}.gz"
    path.unlink()
    return SimpleNamespace(path=path, body=mnist.packed[path.name], url=mnist.mirror + path.name, load=load)


def assert_right(digits: Digits, contents: dict[str, bytes]) -> None:
    """Each pixel and label, against the bytes that the files were made of."""
    assert digits.train.images.shape[1:] == digits.test.images.shape[1:] == (1, 28, 28)
    tensors = (digits.train.images, digits.train.labels, digits.test.images, digits.test.labels)
    for (name, content), tensor in zip(contents.items(), tensors, strict=True):
        header, dtype = (16, torch.uint8) if "images" in name else (8, torch.int64)
        assert tensor.dtype == dtype
        assert tensor.to(torch.uint8).numpy().tobytes() == content[header:]


def left_in(folder: Path) -> list[str]:
    """The names in a folder, all but the lock's."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


# ---- What is read


def test_addresses_and_hashes_are_torchvisions() -> None:
    assert [(f"{name}.gz", md5_gz) for name, (md5_gz, _) in sources.FILES.items()] == MNIST.resources
    assert list(sources.MIRRORS) == MNIST.mirrors
    assert sources.IMAGENET_URL == ResNet18_Weights.IMAGENET1K_V1.url
    assert sources.IMAGENET_URL.endswith(f"-{sources.IMAGENET_SHA256[:8]}.pth")


@pytest.mark.parametrize("form", ["packed", "unpacked", "both", "a damaged raw file beside a whole .gz"])
def test_packed_and_unpacked_files_are_read_without_network_and_without_writing(
    form: str, mnist: Any, server: Any, monkeypatch: MonkeyPatch
) -> None:
    for name, content in mnist.contents.items():
        if form != "packed":
            (mnist.raw_dir / name).write_bytes(content[:100] if "damaged" in form else content)
        if form == "unpacked":
            (mnist.raw_dir / f"{name}.gz").unlink()
    before = sorted(os.listdir(mnist.raw_dir))
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(Path(mnist.dir).parent))
    assert_right(load_mnist("~/data", [mnist.mirror]), mnist.contents)
    assert server.requests == [] and sorted(os.listdir(mnist.raw_dir)) == before  # a read-only folder will do


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half written": lambda content: content[: len(content) // 2],
    "one bit flipped": lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:],
    "one image too many": lambda content: content + b"\1" * 784,
    "zeros, as after a power cut": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("form", ["unpacked", "packed", "sound .gz of damaged content"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_fetched_again_not_trained_on(
    damage: str, form: str, mnist: Any, server: Any, capsys: CaptureFixture
) -> None:
    packed = path = mnist.raw_dir / f"{IMAGES}.gz"
    content = DAMAGE[damage](mnist.contents[IMAGES])
    if form == "packed":
        content = DAMAGE[damage](mnist.packed[packed.name])
    elif form == "unpacked":
        packed.unlink()
        path = mnist.raw_dir / IMAGES
    else:
        content = gzip.compress(content)
    path.write_bytes(content)
    assert_right(load_mnist(mnist.dir, [mnist.mirror]), mnist.contents)
    assert server.requests == [f"/mnist/{packed.name}"]
    assert packed.read_bytes() == mnist.packed[packed.name]
    assert f"{path}: damaged" in capsys.readouterr().err


# ---- What is downloaded


@pytest.mark.parametrize("end", ["", "/"])
def test_missing_files_come_from_the_mirror_once(end: str, mnist: Any, server: Any, tmp_path: Path) -> None:
    for _ in range(2):
        digits = load_mnist(str(tmp_path / "new" / "data"), [mnist.mirror.rstrip("/") + end])
        assert_right(digits, mnist.contents)
        assert server.requests == [f"/mnist/{name}" for name in mnist.packed]
    raw_dir = tmp_path / "new" / "data" / "MNIST" / "raw"
    assert {name: (raw_dir / name).read_bytes() for name in left_in(raw_dir)} == mnist.packed


@pytest.mark.parametrize("terminal", [False, True])
def test_missing_file_alone_is_downloaded_once_and_all_may_read_it(
    terminal: bool, missing: Any, server: Any, capsys: CaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for _ in range(2):
        missing.load()
    assert [server.url + path for path in server.requests] == [missing.url]
    assert missing.path.read_bytes() == missing.body
    assert stat.S_IMODE(missing.path.stat().st_mode) == 0o644
    said = capsys.readouterr().err
    assert said.startswith(f"Downloading {missing.url}\n") and ("100%" in said) == terminal  # a bar for terminals


def test_wrong_file_in_the_place_of_the_weights_is_refused_or_replaced(weights: Any, server: Any) -> None:
    weights.path.write_bytes(weights.body[:1000])
    server.answers.clear()
    with pytest.raises(UserError, match=rf"\ngot {weights.path} \(damaged\); {weights.url} \(404 "):
        weights.load()
    server.answers["/resnet18.pth"] = weights.body
    assert weights.load().read_bytes() == weights.body


def send(handler: BaseHTTPRequestHandler, body: bytes, promised: int = 0, then_stall: bool = False) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(promised or len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    if then_stall:
        handler.server.over.wait(20)


BAD_SERVERS: dict[str, tuple[Callable[[BaseHTTPRequestHandler, bytes], object], str]] = {  # and the reason given
    "is out of order": (lambda handler, body: handler.send_error(503), "503 .*Service Unavailable"),
    "hangs up in the body": (lambda handler, body: send(handler, body[:-9], len(body)), "9 more expected"),
    "stops in the body": (lambda handler, body: send(handler, body[:20], len(body), then_stall=True), "timed out"),
    "sends a wrong bit": (lambda handler, body: send(handler, body[:-9] + b"!" + body[-8:]), "hash"),
    "speaks no HTTP": (lambda handler, body: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"), "SSH-2.0"),
}


@pytest.mark.parametrize("case", BAD_SERVERS)
def test_failed_download_gives_the_reason_leaves_nothing_and_the_next_mirror_is_asked(
    case: str, missing: Any, mnist: Any, server: Any, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "NETWORK_TIMEOUT", 0.2)
    misbehave, reason = BAD_SERVERS[case]
    before, place = left_in(missing.path.parent), missing.url.removeprefix(server.url)
    whole, server.answers[place] = server.answers[place], lambda handler: misbehave(handler, missing.body)
    with pytest.raises(UserError, match=rf"^expected .*\ngot {missing.url} \(.*({reason}).*\)\nput .*$"):
        missing.load()
    assert left_in(missing.path.parent) == before
    server.answers[place] = whole
    for name, content in mnist.packed.items():
        server.answers[f"/bad/{name}"] = lambda handler, body=content: misbehave(handler, body)
    assert_right(load_mnist(str(tmp_path / "new"), [f"{server.url}/bad", mnist.mirror]), mnist.contents)
    assert left_in(tmp_path / "new" / "MNIST" / "raw") == sorted(mnist.packed)


@pytest.mark.parametrize("dead", ["http://127.0.0.1:1", "no address at all", "gopher://127.0.0.1", "http://[::1"])
def test_unusable_address_is_a_failed_download_not_a_traceback(dead: str, missing: Any) -> None:
    with pytest.raises(UserError, match=rf"\ngot {re.escape(dead)}.* \(.+\)\n"):
        missing.load(dead)


def test_without_network_the_three_lines_say_what_to_do(
    mnist: Any, weights: Any, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    nobody = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=nobody))
    reason = f"([Errno {socket.EAI_NONAME}] Name or service not known)"
    with pytest.raises(UserError) as raised:
        load_mnist(str(tmp_path))
    expected, got, remedy = str(raised.value).split("\n")
    assert f"{IMAGES}.gz in {tmp_path / 'MNIST' / 'raw'}" in expected
    assert got == "got " + "; ".join(f"{mirror}{IMAGES}.gz {reason}" for mirror in MNIST.mirrors)
    assert all(hint in remedy for hint in [*mnist.packed, "--data.mirrors '[", "--data.source digits"])

    with pytest.raises(UserError) as raised:
        weights.load("http://mirror.example")
    expected, got, remedy = str(raised.value).split("\n")
    assert f"{weights.path.parent} (sha256:{sources.IMAGENET_SHA256})" in expected
    assert got == f"got http://mirror.example/resnet18.pth {reason}"
    assert all(hint in remedy for hint in ["http://mirror.example/", "--model.weights PATH", "--model.weights none"])


def test_two_that_start_together_download_once(missing: Any, server: Any, monkeypatch: MonkeyPatch) -> None:
    together, download = threading.Barrier(2, timeout=10), sources.download

    def meet(*args: Any) -> None:
        together.wait()  # both have seen that the file is missing; from here the lock decides
        download(*args)

    monkeypatch.setattr(sources, "download", meet)
    both = [threading.Thread(target=missing.load) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [server.url + path for path in server.requests] == [missing.url]
    assert missing.path.read_bytes() == missing.body


# ---- Folders that can't be used. Refusals are played: root, as whom tests run in a container, may write anywhere.


@pytest.mark.parametrize("blocked", ["data", "data/MNIST/raw"])
def test_file_in_the_place_of_a_folder_is_explained(blocked: str, tmp_path: Path, mirror: str, server: Any) -> None:
    data_dir = tmp_path / "data"
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("not a folder")
    with pytest.raises(UserError, match=rf"^expected .*: {data_dir}/MNIST/raw\ngot .*{data_dir}.*\n.*--data.data_dir"):
        load_mnist(str(data_dir), [mirror])
    assert server.requests == []


@pytest.mark.parametrize("refused", ["pathlib.Path.mkdir", "filelock.FileLock.acquire", "os.chmod", "shutil.move"])
def test_folder_that_refuses_is_explained(refused: str, missing: Any, monkeypatch: MonkeyPatch) -> None:
    before = left_in(missing.path.parent)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(missing.path.parent))
    monkeypatch.setattr(refused, Mock(side_effect=full))
    with pytest.raises(UserError, match=re.escape(f"{full.strerror}: '{missing.path.parent}'")) as raised:
        missing.load()
    assert f"got {missing.url}" not in str(raised.value)  # the server isn't to blame
    assert left_in(missing.path.parent) == before


def test_file_without_read_permission_is_explained(mnist: Any, monkeypatch: MonkeyPatch) -> None:
    locked = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(mnist.raw_dir / f"{IMAGES}.gz"))
    monkeypatch.setattr(gzip, "open", Mock(side_effect=locked))
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=locked))
    with pytest.raises(UserError, match=rf"Permission denied: .*{IMAGES}\.gz'\n"):
        load_mnist(mnist.dir)


@pytest.mark.parametrize("host", ["192.0.2.1", "mnist.example"])
def test_tests_reach_no_other_machine(host: str, missing: Any) -> None:
    """The guard of conftest.py."""
    with pytest.raises(pytest.fail.Exception, match=f"wants to reach {host}"):
        socket.create_connection((host, 80))
    with pytest.raises(pytest.fail.Exception, match=f"wants to reach {host}"):
        missing.load(f"http://{host}")  # not taken for a dead mirror


# ---- scikit-learn's digits


def test_digits_are_like_mnist_and_the_last_360_are_for_testing() -> None:
    train, test = load_digits()
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert (images.shape, images.dtype) == ((1797, 1, 28, 28), torch.uint8)
    assert labels.dtype == torch.int64 and labels.tolist() == sklearn_digits().target.tolist()
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[4:24, 4:24] = False
    assert images[..., frame].max() == 0  # ink in the 20×20 box only
    assert images.amax((1, 2, 3)).min() > 200  # ink is light
    assert images.float().mean() < 100  # most is paper


def test_digits_keep_the_ink_where_scikit_learn_has_it() -> None:
    coarse = torch.from_numpy(sklearn_digits().images).float()  # (N, 8, 8)
    box = torch.cat([part.images for part in load_digits()])[:, 0, 4:24, 4:24].float()  # (N, 20, 20)
    again = torch.nn.functional.adaptive_avg_pool2d(box, 8)  # neither turned, mirrored nor in another order
    rows = torch.stack([coarse.flatten(1), again.flatten(1)])  # (2, N, 64)
    rows = rows - rows.mean(2, keepdim=True)
    assert torch.cosine_similarity(rows[0], rows[1]).min() > 0.9
