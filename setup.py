"""Package discovery only; everything else is in pyproject.toml, which cannot both find and add packages."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["dmpo_dist", "dmpo_dist.*"], exclude=["*.__pycache__"]),
        "dmpo_dist.deepspeed_configs",  # the top-level folder deepspeed_configs/
        "dmpo_dist.recipes",  # launch/recipes/
    ]
)
