"""What several test modules share: small MNIST files, finished runs, a web server, and a guard against all others.

The files are real IDX files, packed as the official ones are, with 640 + 200 of scikit-learn's digits in them: a model
learns them. `mnist_lightning.sources.FILES` is made to expect just these.
"""

import functools
import gzip
import hashlib
import io
import os
import shutil
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import pytest
import torch
from foreign_project.letters import write_letters
from lightning.pytorch import Trainer
from running import READER, RUN, SHORT, Fit, fit, write_pictures
from torchvision.models import resnet18

from mnist_lightning import data, sources

TRAIN, TEST = 640, 200  # images in the small files; 200 isn't a multiple of any batch size in use

Answer = bytes | Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small batches gain nothing from a second thread, and lose much of it on a machine that is busy otherwise."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def digits_read_once() -> Iterator[None]:
    """Hundreds of tests use scikit-learn's digits, and each reading takes 50 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_digits", functools.cache(sources.load_digits))
        yield


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The features that a test keeps are its own; LightningCLI warns of pytest's own arguments. A Trainer with
    --strategy ddp leaves torch's process group, a number of threads of its own, and variables that would tell the next
    one of other processes."""
    before = dict(os.environ)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(sys, "argv", ["mnist_lightning"])
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(1)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def quiet() -> Callable[..., Trainer]:
    """Makes a Trainer on the CPU that neither prints nor writes anything, but for what it is asked to."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    off |= {"accelerator": "cpu", "num_sanity_val_steps": 0}
    return lambda **settings: Trainer(**(off | settings))


# ---- Finished runs: each is trained once, and a test gets a copy of its own


@pytest.fixture(scope="session")
def convnet_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Two epochs of ConvNet on the digits, 42 steps, with pictures."""
    settings = ("--data.source", "digits", "--data.batch_size", 64, "--trainer.max_epochs", 2)
    return fit(tmp_path_factory.mktemp("convnet"), *settings, "--trainer.log_every_n_steps", 10)


@pytest.fixture(scope="session")
def resnet_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A fit of ResNet18 with its own number of epochs, with pictures. Its file of weights is gone afterwards."""
    weights = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), weights)
    settings = ("--model", "ResNet18", "--model.weights", weights, "--model.image_size", 28, *SHORT)
    drawn = ("--pictures", "true", "--trainer.log_every_n_steps", 1)
    fitted = fit(tmp_path_factory.mktemp("resnet"), *settings, *drawn)
    weights.unlink()
    return fitted


@pytest.fixture
def convnet(convnet_fit: Fit, folder: Path) -> Path:
    """ConvNet's run; lightning_logs is in the current folder."""
    shutil.copytree(convnet_fit.root, folder, dirs_exist_ok=True)
    return RUN


@pytest.fixture
def resnet(resnet_fit: Fit, folder: Path) -> Path:
    shutil.copytree(resnet_fit.root, folder, dirs_exist_ok=True)
    return Path("lightning_logs", "ResNet18-digits", "version_0")


@pytest.fixture(scope="session")
def pictures_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A fit on pictures of two classes, of which two are broken: photos/ lies beside lightning_logs."""
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "photos")
    settings = ("--data.path", "photos", "--data.size", 32, "--model.weights", "none", "--model.optimizer.lr", 0.1)
    with redirect_stderr(io.StringIO()) as error:
        fitted = fit(root, "--model", "ResNet18", "--data", "ImageFolder", *settings, "--trainer.max_epochs", 2)
    return fitted._replace(out=error.getvalue() + fitted.out)


@pytest.fixture
def pictures(pictures_fit: Fit, folder: Path) -> Path:
    """Its run; photos/ and lightning_logs are in the current folder."""
    shutil.copytree(pictures_fit.root, folder, dirs_exist_ok=True)
    return Path("lightning_logs", "ResNet18", "version_0")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of tests/foreign_project/."""
    folder = tmp_path_factory.mktemp("drawn")
    write_letters(folder / "letters")
    write_letters(folder / "two", classes=2, train=40, test=10)
    return folder


@pytest.fixture(scope="session")
def reader_fit(drawn: Path) -> Fit:
    """Of foreign_project's Reader, for 3 epochs: the model's own default. It says so where it can't draw."""
    with redirect_stderr(io.StringIO()) as error:
        fitted = fit(drawn, *READER.split())
    return fitted._replace(out=fitted.out + error.getvalue())


@pytest.fixture
def letters(drawn: Path, folder: Path) -> None:
    """The pictures are in the current folder."""
    for name in ("letters", "two"):
        Path(name).symlink_to(drawn / name)


@pytest.fixture
def reader(reader_fit: Fit, letters: None) -> str:
    """Reader's run; what the fit printed."""
    shutil.copytree(reader_fit.root / "lightning_logs", "lightning_logs")
    return reader_fit.out


# ---- The network and MNIST's files


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that looks up or connects to another machine. Child processes are not covered."""

    def checked(host: object) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", "localhost", "::1") and not str(name).startswith("127."):
            # pytest.fail raises a BaseException: the code under test, which takes an OSError for a dead mirror and goes
            # on, can't swallow it.
            pytest.fail(f"tests use no network, but something wants to reach {name}")

    def guarded(connect: Callable) -> Callable:
        def connect_here(self: socket.socket, address: object) -> object:
            if isinstance(address, tuple):  # a str is a Unix socket
                checked(address[0])
            return connect(self, address)

        return connect_here

    def getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        checked(host)
        return lookup(host, *args, **kwargs)

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setenv("no_proxy", "*")  # a proxy of this machine's owner would be asked for 127.0.0.1, too


@pytest.fixture(scope="session")
def idx_contents() -> dict[str, bytes]:
    """The four unpacked files by name: magic number, a count for each dimension, the bytes."""
    train, test = sources.load_digits()
    tensors = (train.images[:TRAIN, 0], train.labels[:TRAIN], test.images[:TEST, 0], test.labels[:TEST])
    contents = {}
    for name, tensor in zip(sources.FILES, tensors, strict=True):
        magic = bytes([0, 0, 8, tensor.ndim])  # 8: unsigned bytes
        counts = b"".join(count.to_bytes(4, "big") for count in tensor.shape)
        contents[name] = magic + counts + tensor.to(torch.uint8).numpy().tobytes()
    return contents


@pytest.fixture(scope="session")
def idx_packed(idx_contents: dict[str, bytes]) -> dict[str, bytes]:
    """The four .gz files by name: what a mirror serves."""
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in idx_contents.items()}


@pytest.fixture
def small_files(
    monkeypatch: pytest.MonkeyPatch, idx_contents: dict[str, bytes], idx_packed: dict[str, bytes]
) -> dict[str, tuple[str, str]]:
    """`sources.FILES`, expecting the small files in place of the official ones."""

    def md5(content: bytes) -> str:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    files = {name: (md5(idx_packed[f"{name}.gz"]), md5(content)) for name, content in idx_contents.items()}
    monkeypatch.setattr(sources, "FILES", files)
    return files


@pytest.fixture
def mnist_dir(tmp_path: Path, small_files: dict[str, tuple[str, str]], idx_packed: dict[str, bytes]) -> str:
    """A data_dir, the test's own, that holds the small files as MNIST/raw/*.gz. A str, as --data.data_dir gives."""
    raw_dir = tmp_path / "data" / "MNIST" / "raw"
    raw_dir.mkdir(parents=True)
    for name, content in idx_packed.items():
        (raw_dir / name).write_bytes(content)
    return str(tmp_path / "data")


class Server(ThreadingTCPServer):
    """Answers GET on 127.0.0.1. (Not HTTPServer: that looks up the machine's name, which takes seconds on some.)

    Attributes:
        url: its address, without a slash at the end.
        answers: by path, the body, or a function that does what it likes with the request; all else is 404.
        requests: paths asked for, in order.
        over: set when the test ends; an answer that is to stall waits for it.
    """

    daemon_threads = False  # server_close() then waits for the threads: nothing runs on into the next test

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 10  # seconds; a client that reads nothing can't hang the tests

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        answer = self.server.answers.get(self.path)
        try:
            if answer is None:
                self.send_error(404)
            elif callable(answer):
                answer(self)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
        except ConnectionError:
            pass  # the client has given up

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """A web server on this machine with nothing to serve yet: fill `server.answers`."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds until it sees the shutdown
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def mirror(server: Server, small_files: dict[str, tuple[str, str]], idx_packed: dict[str, bytes]) -> str:
    """The address of a mirror, on `server`, that has the small files."""
    server.answers.update({f"/mnist/{name}": content for name, content in idx_packed.items()})
    return f"{server.url}/mnist/"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After `-m reliability`: the counts of docs/reliability.md."""
    passed = terminalreporter.getreports("passed")
    tried = Counter(value for report in passed for name, value in report.user_properties if name == "tried")
    if tried and terminalreporter.config.option.markexpr == "reliability":
        terminalreporter.section("fault, times survived")
        for fault, count in tried.items():
            terminalreporter.line(f"{fault:<64} {count:>5}")
