"""Starting stages: preparing the run folder, launching ranks, showing progress."""
