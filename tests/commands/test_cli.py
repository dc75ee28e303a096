"""run(): in a thread, beside other signal handlers, in a process of its own."""

import signal
import threading
from pathlib import Path

import pytest
from running import SHORT, Fit, accuracy, command, process


def test_fit_works_in_a_thread_and_gives_the_signal_handlers_back(folder: Path) -> None:
    out: list[str] = []
    fit = ("fit", *SHORT, "--trainer.max_epochs", "1")
    thread = threading.Thread(target=lambda: out.append(command(*fit)))
    thread.start()
    thread.join()
    assert "Test accuracy" in out[0]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    command(*fit)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.slow
def test_new_process_finds_the_best_checkpoint(convnet: Path, convnet_fit: Fit) -> None:
    ended = process("test", "--ckpt_path", "best")
    assert ended.returncode == 0
    assert accuracy(ended.stdout) == accuracy(convnet_fit.out)
    assert "Warning" not in ended.stderr
