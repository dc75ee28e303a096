"""What the tables share: the machine, and figures as median (min to max, n)."""

import platform
import statistics
from collections.abc import Sequence

import lightning
import torch


def machine() -> str:
    """One line: processor, cores in use, versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    return f"{name}, {torch.get_num_threads()} threads{gpu}; {versions}"


def gflops() -> float:
    """The machine's matrix-multiply rate now: the best of 10 products of 2048×2048 float32 matrices, in GFLOP/s."""
    from torch.utils.benchmark import Timer

    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(Timer("a @ a", globals={"a": a}).timeit(1).mean for _ in range(10)) / 1e9


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """median (min to max, n = ...)."""
    middle = f"{statistics.median(values):.{digits}f}{unit}"
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f}, n = {len(values)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
