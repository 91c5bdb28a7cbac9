"""One HTML page about runs: gather what folders hold -> tables and figures -> page."""
