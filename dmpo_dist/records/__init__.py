"""Writing and reading the files of a run's folder: log records, trackers, environment, comparisons."""
