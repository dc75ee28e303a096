"""Downloading and reading: right bytes or a UserError, on any network and after any crash."""

import errno
import gzip
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torchvision.datasets import MNIST

import mnist_lightning
from mnist_lightning import sources
from mnist_lightning.errors import UserError
from mnist_lightning.sources import Digits, load_digits, load_mnist

LABELS = "t10k-labels-idx1-ubyte"  # the smallest of the four


@pytest.fixture
def raw_dir(mnist_dir: str) -> Path:
    """The folder of the four intact .gz files."""
    return Path(mnist_dir) / "MNIST" / "raw"


@pytest.fixture
def empty_dir(tmp_path: Path, small_files: object) -> Path:
    """A data_dir that isn't there yet."""
    return tmp_path / "new" / "data"


def assert_right(digits: Digits, contents: dict[str, bytes]) -> None:
    """Each pixel and label, against the bytes that the files were made of."""
    tensors = (digits.train.images, digits.train.labels, digits.test.images, digits.test.labels)
    for (name, content), tensor in zip(contents.items(), tensors, strict=True):
        header = 16 if "images" in name else 8
        assert tensor.to(torch.uint8).numpy().tobytes() == content[header:]


def left_in(folder: Path) -> list[str]:
    """The names in a folder, all but the lock's."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


# ---- What is read


def test_official_files_are_those_of_torchvision() -> None:
    assert [(f"{file.name}.gz", file.md5_gz) for file in sources.FILES] == MNIST.resources
    assert [file.size for file in sources.FILES] == [47_040_016, 60_008, 7_840_016, 10_008]


def test_shapes_and_types_are_as_promised(mnist_dir: str) -> None:
    train, test = load_mnist(mnist_dir)
    assert (train.images.shape, train.labels.shape) == ((640, 1, 28, 28), (640,))
    assert (test.images.shape, test.labels.shape) == ((200, 1, 28, 28), (200,))
    assert {part.images.dtype for part in (train, test)} == {torch.uint8}
    assert {part.labels.dtype for part in (train, test)} == {torch.int64}


@pytest.mark.parametrize("form", ["packed", "unpacked", "both"])
def test_packed_and_unpacked_files_are_read_without_network(
    form: str, raw_dir: Path, mnist_dir: str, server: Any, idx_contents: dict[str, bytes]
) -> None:
    for name, content in idx_contents.items():
        if form != "packed":
            (raw_dir / name).write_bytes(content)
        if form == "unpacked":
            (raw_dir / f"{name}.gz").unlink()
    assert_right(load_mnist(mnist_dir, [server.url]), idx_contents)
    assert server.requests == server.probes == []


def test_read_only_folder_with_the_files_is_enough(
    raw_dir: Path, mnist_dir: str, idx_contents: dict[str, bytes], idx_packed: dict[str, bytes]
) -> None:
    raw_dir.chmod(0o555)
    try:
        assert_right(load_mnist(mnist_dir), idx_contents)
        assert sorted(os.listdir(raw_dir)) == sorted(idx_packed)  # root may write, but nothing tried to
    finally:
        raw_dir.chmod(0o755)


def test_home_folder_may_be_written_as_a_tilde(
    mnist_dir: str, idx_contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(mnist_dir).parent))
    monkeypatch.setenv("USERPROFILE", str(Path(mnist_dir).parent))
    assert_right(load_mnist("~/data"), idx_contents)


# ---- What is damaged

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half written": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "one byte too long": lambda content: content + b"\1",
    "one bit flipped": lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:],
    "zeros, as after a power cut": lambda content: bytes(len(content)),
    "another file": lambda content: b"<html>404</html>",
}
REPACKED = {  # sound .gz files of content that isn't MNIST's
    "wrong magic number": lambda content: b"\0\0\x09" + content[3:],
    "wrong count": lambda content: content[:7] + bytes([content[7] ^ 1]) + content[8:],
    "one image too few": lambda content: content[:-784],
    "one image too many": lambda content: content + bytes(784),
}


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", LABELS])
@pytest.mark.parametrize("damage", [*DAMAGE, *REPACKED])
def test_damaged_raw_file_is_fetched_again_not_trained_on(
    damage: str, name: str, raw_dir: Path, mnist_dir: str, mirror: str, server: Any,
    idx_contents: dict[str, bytes], capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    (raw_dir / f"{name}.gz").unlink()
    (raw_dir / name).write_bytes((DAMAGE | REPACKED)[damage](idx_contents[name]))
    assert_right(load_mnist(mnist_dir, [mirror]), idx_contents)
    assert server.requests == [f"/mnist/{name}.gz"]
    assert f"{raw_dir / name}: not MNIST's bytes" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [*DAMAGE, *REPACKED])
def test_damaged_gz_is_fetched_again_not_trained_on(
    damage: str, raw_dir: Path, mnist_dir: str, mirror: str, server: Any,
    idx_contents: dict[str, bytes], idx_packed: dict[str, bytes], capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    name = "train-images-idx3-ubyte"
    path = raw_dir / f"{name}.gz"
    if damage in DAMAGE:
        path.write_bytes(DAMAGE[damage](idx_packed[path.name]))
    else:
        path.write_bytes(gzip.compress(REPACKED[damage](idx_contents[name])))
    assert_right(load_mnist(mnist_dir, [mirror]), idx_contents)
    assert server.requests == [f"/mnist/{path.name}"]
    assert path.read_bytes() == idx_packed[path.name]
    assert f"{path}: not MNIST's bytes" in capsys.readouterr().err


def test_damaged_raw_file_beside_an_intact_gz_needs_no_network(
    raw_dir: Path, mnist_dir: str, idx_contents: dict[str, bytes], server: Any
) -> None:
    (raw_dir / LABELS).write_bytes(idx_contents[LABELS][:100])
    assert_right(load_mnist(mnist_dir, [server.url]), idx_contents)
    assert server.probes == []


@pytest.mark.parametrize("packed", [True, False])
def test_no_more_is_read_of_an_endless_file_than_tells_it_is_wrong(
    packed: bool, tmp_path: Path, small_files: tuple[sources.IDXFile, ...]
) -> None:
    endless = 64 * 2**20
    if packed:
        (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(bytes(endless), compresslevel=1))  # a gzip bomb
    else:
        with open(tmp_path / LABELS, "wb") as stream:
            stream.truncate(endless)
    tracemalloc.start()
    try:
        assert sources._read(tmp_path, small_files[3]) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_on_disk_give_the_right_content_or_none(
    seed: int, tmp_path: Path, small_files: tuple[sources.IDXFile, ...],
    idx_contents: dict[str, bytes], idx_packed: dict[str, bytes],
) -> None:  # fmt: skip
    draw = random.Random(seed)
    for _ in range(50):
        name = LABELS + draw.choice(["", ".gz"])
        damaged = bytearray((idx_contents | idx_packed)[name])
        for _ in range(draw.randrange(3)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            del damaged[draw.randrange(len(damaged)) :]
        if draw.random() < 0.3:
            damaged += draw.randbytes(draw.randrange(20))
        if draw.random() < 0.1:
            damaged = draw.randbytes(draw.randrange(300))
        path = tmp_path / name
        path.write_bytes(damaged)
        content = sources._read(tmp_path, small_files[3])
        path.unlink()
        assert content in (None, idx_contents[LABELS]), damaged.hex()


# ---- What is downloaded


def test_missing_files_come_from_the_mirror(
    empty_dir: Path, mirror: str, server: Any, idx_contents: dict[str, bytes], idx_packed: dict[str, bytes]
) -> None:
    assert_right(load_mnist(str(empty_dir), [mirror]), idx_contents)
    assert server.requests == [f"/mnist/{name}" for name in idx_packed]
    raw_dir = empty_dir / "MNIST" / "raw"
    assert left_in(raw_dir) == sorted(idx_packed)
    assert all((raw_dir / name).read_bytes() == content for name, content in idx_packed.items())


def test_second_run_downloads_nothing(
    empty_dir: Path, mirror: str, server: Any, idx_contents: dict[str, bytes]
) -> None:
    load_mnist(str(empty_dir), [mirror])
    asked = len(server.requests)
    assert_right(load_mnist(str(empty_dir), [mirror]), idx_contents)
    assert len(server.requests) == asked == 4


def test_only_the_missing_file_is_downloaded(raw_dir: Path, mnist_dir: str, mirror: str, server: Any) -> None:
    (raw_dir / f"{LABELS}.gz").unlink()
    load_mnist(mnist_dir, [mirror])
    assert server.requests == [f"/mnist/{LABELS}.gz"]


def test_mirror_address_may_lack_its_slash(empty_dir: Path, mirror: str, idx_contents: dict[str, bytes]) -> None:
    assert_right(load_mnist(str(empty_dir), [mirror.rstrip("/")]), idx_contents)


Misbehaviour = Callable[[BaseHTTPRequestHandler, bytes], None]


def send(handler: BaseHTTPRequestHandler, promised: int, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(promised))
    handler.end_headers()
    handler.wfile.write(body)


BAD_MIRRORS: dict[str, tuple[Misbehaviour, str]] = {  # what it does with the right bytes, and the reason given
    "has not got it": (lambda handler, body: handler.send_error(404), "404: Not Found"),
    "is out of order": (lambda handler, body: handler.send_error(503), "503: Service Unavailable"),
    "hangs up at once": (lambda handler, body: None, "closed connection"),
    "hangs up in the body": (lambda handler, body: send(handler, len(body), body[:-9]), "corrupted|Incomplete"),
    "sends nothing": (lambda handler, body: send(handler, 0, b""), "corrupted"),
    "sends half a file": (lambda handler, body: send(handler, len(body) // 2, body[: len(body) // 2]), "corrupted"),
    "sends a wrong bit": (lambda handler, body: send(handler, len(body), body[:-9] + b"!" + body[-8:]), "corrupted"),
    "sends a sign-in page": (lambda handler, body: send(handler, 4, b"<ht>"), "corrupted"),
    "speaks no HTTP": (lambda handler, body: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"), "SSH-2.0"),
}  # fmt: skip


@pytest.fixture
def bad_mirror(request: pytest.FixtureRequest, server: Any, idx_packed: dict[str, bytes]) -> str:
    misbehave, _ = BAD_MIRRORS[request.param]
    for name, content in idx_packed.items():
        server.answers[f"/bad/{name}"] = lambda handler, body=content: misbehave(handler, body)
    return f"{server.url}/bad/"


@pytest.mark.parametrize("bad_mirror", BAD_MIRRORS, indirect=True)
def test_bad_mirror_is_passed_over_for_the_next(
    bad_mirror: str, empty_dir: Path, mirror: str, idx_contents: dict[str, bytes], idx_packed: dict[str, bytes]
) -> None:
    assert_right(load_mnist(str(empty_dir), [bad_mirror, mirror]), idx_contents)
    assert left_in(empty_dir / "MNIST" / "raw") == sorted(idx_packed)


@pytest.mark.parametrize(
    ("bad_mirror", "reason"), [(n, r) for n, (_, r) in BAD_MIRRORS.items()], indirect=["bad_mirror"]
)
def test_failed_download_gives_the_reason_and_leaves_nothing(bad_mirror: str, reason: str, empty_dir: Path) -> None:
    with pytest.raises(UserError, match=rf"\ngot {bad_mirror} \(.*({reason}).*\)\n") as raised:
        load_mnist(str(empty_dir), [bad_mirror])
    assert len(str(raised.value).splitlines()) == 3
    assert left_in(empty_dir / "MNIST" / "raw") == []


def test_content_that_passes_its_md5_but_not_ours_is_refused(
    empty_dir: Path, mirror: str, monkeypatch: pytest.MonkeyPatch, small_files: tuple[sources.IDXFile, ...]
) -> None:
    monkeypatch.setattr(sources, "FILES", tuple(file._replace(md5="0" * 32) for file in small_files))
    with pytest.raises(UserError, match=r"its content isn't MNIST's"):
        load_mnist(str(empty_dir), [mirror])


def test_answer_of_a_refusing_mirror_is_closed(empty_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise refusal

    refusal = HTTPError("http://127.0.0.1", 404, "Not Found", Message(), io.BytesIO())
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refused)
    with pytest.raises(UserError, match="404: Not Found"):
        load_mnist(str(empty_dir), ["http://127.0.0.1"])
    assert refusal.fp.closed  # Python 3.13 would warn of it, in whichever test is running then


@pytest.mark.parametrize("address", ["refused", "no address at all", "http://", "gopher://127.0.0.1", "http://[::1"])
def test_unusable_address_is_a_failed_mirror_not_a_traceback(address: str, empty_dir: Path) -> None:
    address = closed_port() if address == "refused" else address
    with pytest.raises(UserError, match=re.escape(f"got {address} (")):
        load_mnist(str(empty_dir), [address])


def test_without_network_the_three_lines_say_what_to_do(
    empty_dir: Path, monkeypatch: pytest.MonkeyPatch, idx_packed: dict[str, bytes]
) -> None:
    def getaddrinfo(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(UserError) as raised:
        load_mnist(str(empty_dir))
    expected, got, remedy = str(raised.value).split("\n")
    assert str(empty_dir / "MNIST" / "raw") in expected
    assert all(f"{address} (<urlopen error" in got for address in MNIST.mirrors)
    assert all(hint in remedy for hint in [*idx_packed, "--data.mirrors '[", "--data.source digits"])


@pytest.fixture
def silent_host() -> Iterator[str]:
    """A host that takes connections and swallows packets. After 20 s it hangs up: a mistake can't hang the tests."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        watchdog = threading.Timer(20, listening.close)
        watchdog.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        watchdog.cancel()
        watchdog.join()


def test_host_that_never_answers_is_given_up(
    raw_dir: Path, mnist_dir: str, silent_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "NETWORK_TIMEOUT", 0.2)
    (raw_dir / f"{LABELS}.gz").unlink()
    with pytest.raises(UserError, match=rf"got {silent_host} \(.*timed out"):
        load_mnist(mnist_dir, [silent_host])
    assert socket.getdefaulttimeout() is None  # everybody else's sockets are as before


def test_host_that_stops_in_the_body_is_given_up(
    raw_dir: Path, mnist_dir: str, server: Any, idx_packed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stall(handler: BaseHTTPRequestHandler) -> None:
        body = idx_packed[f"{LABELS}.gz"]
        send(handler, len(body), body[:20])
        handler.wfile.flush()
        handler.server.over.wait(20)

    monkeypatch.setattr(sources, "NETWORK_TIMEOUT", 0.2)
    (raw_dir / f"{LABELS}.gz").unlink()
    server.answers[f"/{LABELS}.gz"] = stall
    with pytest.raises(UserError, match=rf"got {server.url} \(.*timed out"):
        load_mnist(mnist_dir, [server.url])
    assert LABELS not in "".join(left_in(raw_dir))


def test_interrupted_download_leaves_nothing(empty_dir: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(url: str, folder: str, md5: str) -> None:
        (Path(folder) / url.rpartition("/")[2]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.download_url", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(str(empty_dir), [mirror])
    assert left_in(empty_dir / "MNIST" / "raw") == []
    assert socket.getdefaulttimeout() is None


OTHER_PROCESS = """
import json, sys
import torchvision.datasets
from mnist_lightning import sources

files, data_dir, mirror = json.loads(sys.argv[1])
sources.FILES = tuple(sources.IDXFile(name, tuple(shape), *md5s) for name, shape, *md5s in files)
read = sources._read

def first_look(raw_dir, file):
    sources._read = read
    content = read(raw_dir, file)
    print("files there" if content else "nothing there", flush=True)
    sys.stdin.readline()  # until the test's process has looked, too
    return content

sources._read = first_look
print(sources.load_mnist(data_dir, [mirror]).train.labels.tolist())
"""


def test_two_processes_that_start_together_download_once(
    empty_dir: Path, mirror: str, server: Any, small_files: tuple[sources.IDXFile, ...],
    idx_contents: dict[str, bytes], idx_packed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def first_look(raw_dir: Path, file: sources.IDXFile) -> None:
        monkeypatch.setattr(sources, "_read", read)
        assert read(raw_dir, file) is None
        assert other.stdout.readline() == "nothing there\n"
        other.stdin.write("go\n")  # both have seen that they must download: the lock decides who does
        other.stdin.flush()

    read = sources._read
    monkeypatch.setattr(sources, "_read", first_look)
    command = [sys.executable, "-c", OTHER_PROCESS, json.dumps([small_files, str(empty_dir), mirror])]
    where = Path(mnist_lightning.__file__).parents[1]
    other = subprocess.Popen(command, cwd=where, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert_right(load_mnist(str(empty_dir), [mirror]), idx_contents)
        output, _ = other.communicate(timeout=60)
    finally:
        other.kill()
        other.communicate()
    assert output.strip() == str(list(idx_contents["train-labels-idx1-ubyte"][8:]))
    assert sorted(server.requests) == sorted(f"/mnist/{name}" for name in idx_packed)
    assert left_in(empty_dir / "MNIST" / "raw") == sorted(idx_packed)


# ---- Folders that can't be used


@pytest.mark.parametrize("blocked", ["data_dir is a file", "MNIST is a file", "raw is a file"])
def test_file_in_the_place_of_a_folder_is_explained(blocked: str, tmp_path: Path, mirror: str, server: Any) -> None:
    parts = {"data_dir is a file": "data", "MNIST is a file": "data/MNIST", "raw is a file": "data/MNIST/raw"}
    file = tmp_path / parts[blocked]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("not a folder")
    with pytest.raises(UserError) as raised:
        load_mnist(str(tmp_path / "data"), [mirror])
    expected, got, remedy = str(raised.value).split("\n")
    assert expected.endswith(f"folder to read and write: {tmp_path / 'data'}")
    assert str(tmp_path / "data") in got
    assert "--data.data_dir" in remedy
    assert server.requests == []


WRITES = ("pathlib.Path.mkdir", "filelock.FileLock.acquire", "mnist_lightning.sources.TemporaryDirectory")


# The refusal is played: root, as whom tests run in a container, may write anywhere.
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("refused", WRITES)
def test_folder_that_refuses_is_explained(
    refused: str, number: int, empty_dir: Path, mirror: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(empty_dir))

    monkeypatch.setattr(refused, refuse)
    with pytest.raises(UserError, match=re.escape(f"got {os.strerror(number)}: {empty_dir}\n")):
        load_mnist(str(empty_dir), [mirror])
    assert server.requests == []


def test_file_without_read_permission_is_explained(mnist_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(gzip, "open", refuse)
    with pytest.raises(UserError, match=r"got Permission denied: .*train-images-idx3-ubyte\.gz\n"):
        load_mnist(mnist_dir)


# ---- The guard of conftest.py


@pytest.mark.parametrize("host", ["192.0.2.1", "mnist.example"])
def test_tests_reach_no_other_machine(host: str, empty_dir: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"wants to reach {host}"):
        socket.create_connection((host, 80))
    with pytest.raises(pytest.fail.Exception, match=f"wants to reach {host}"):
        load_mnist(str(empty_dir), [f"http://{host}"])  # not taken for a dead mirror


# ---- scikit-learn's digits


def test_digits_are_like_mnist() -> None:
    train, test = load_digits()
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert (images.shape, images.dtype) == ((1797, 1, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype, labels.unique().tolist()) == ((1797,), torch.int64, list(range(10)))
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[4:24, 4:24] = False
    assert images[..., frame].max() == 0  # ink in the 20×20 box only
    assert images.amax((1, 2, 3)).min() > 200  # ink is light
    assert images.float().mean() < 100  # most is paper


def test_digits_test_images_are_the_last_360() -> None:
    labels = sklearn_digits().target
    train, test = load_digits()
    assert train.labels.tolist() == labels[:-360].tolist()
    assert test.labels.tolist() == labels[-360:].tolist()


def test_digits_keep_the_ink_where_scikit_learn_has_it() -> None:
    coarse = torch.from_numpy(sklearn_digits().images).float()  # (N, 8, 8)
    box = torch.cat([part.images for part in load_digits()])[:, 0, 4:24, 4:24].float()  # (N, 20, 20)
    again = torch.nn.functional.adaptive_avg_pool2d(box, 8)  # neither turned, mirrored nor in another order
    rows = torch.stack([coarse.flatten(1), again.flatten(1)])  # (2, N, 64)
    rows = rows - rows.mean(2, keepdim=True)
    assert torch.cosine_similarity(rows[0], rows[1]).min() > 0.9
