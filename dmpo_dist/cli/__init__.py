"""The command line; start with ``main``."""

from dmpo_dist.cli.main import app as app
from dmpo_dist.cli.main import main as main
