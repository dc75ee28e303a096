"""What TensorBoard and report.png show of a run."""
