"""What a machine or a cluster has and lacks for a run."""
