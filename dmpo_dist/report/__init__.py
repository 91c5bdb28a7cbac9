"""One HTML page about runs: read the folders -> make tables and figures -> render the page."""
