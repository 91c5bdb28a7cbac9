"""The training engine, its loop, checkpoints and metrics."""
