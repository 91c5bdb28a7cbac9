"""Ray: a session on a cluster, a stage's ranks as a Ray Train job, checkpoints and gauges."""
