"""Every number in the docs: `python -m benchmarks.accuracy` and `python -m benchmarks.speed`."""
