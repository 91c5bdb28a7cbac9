"""``python -m dmpo_dist.submit.ready``: wait until a Ray cluster can run a job, and check every node of it."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import dmpo_dist
from dmpo_dist.config import RunConfig, load_config
from dmpo_dist.errors import UserError

POLL_SECONDS = 1.0
NODE_SECONDS = 120


def main() -> None:
    """Exit with status 0 when the cluster is ready, with 2 and a message when it cannot run the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1, help="nodes the cluster must have at least")
    parser.add_argument("--seconds", type=float, default=600, help="how long to wait for them")
    parser.add_argument("--versions", nargs="*", default=[], help="PACKAGE=VERSION of the submitter")
    parser.add_argument("--path", action="append", default=[], help="what every node must see; repeatable")
    options = parser.parse_args()
    try:
        wanted = dict(entry.split("=", 1) for entry in options.versions)
        wait_until_ready(load_config([options.config]), options.nodes, options.seconds, wanted, options.path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def wait_until_ready(config: RunConfig, nodes: int, seconds: float, versions: dict[str, str], paths: list[str]) -> None:
    """Join the Ray cluster, wait for ``nodes`` nodes and the workers' resources, then look at each node.

    Args:
        config: its ``cluster`` section says what the workers need.
        versions: package -> version that each node must have.
        paths: what each node must see.

    Raises:
        UserError: resources still missing after ``seconds``, another version, or a path that a node does not see.
    """
    import logging

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        _wait(lambda: lacking(config, nodes, _alive(ray), ray.cluster_resources()), seconds)
        reports = _look(ray, [*versions], paths)
        problems = [line for name, report in reports for line in node_problems(name, report, versions)]
        if problems:
            raise UserError("\n  ".join(["the cluster's nodes cannot run the job:", *problems]))
        print(f"cluster ready: {len(reports)} nodes, {_amounts(ray.cluster_resources())}", flush=True)
    finally:
        ray.shutdown()


def lacking(config: RunConfig, nodes: int, alive: int, have: dict[str, float]) -> str | None:
    """What the cluster still lacks, with what it has; None when it is enough."""
    cluster = config.cluster
    need = {"CPU": cluster.fewest * cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        need["GPU"] = cluster.fewest * cluster.gpus_per_worker
    if alive < nodes:
        return f"the cluster has {alive} of {nodes} nodes ({_amounts(have)})"
    short = [name for name, amount in need.items() if amount > have.get(name, 0)]
    if not short:
        return None
    key = "workers" if cluster.fewest_workers is None else "fewest_workers"
    needed = f"cluster.{key}={cluster.fewest} need {_amounts(need)}"
    return f"{needed}, but the cluster has {_amounts(have)} on {alive} nodes"


def node_problems(name: str, report: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """Lines about one node's report: versions that differ from the submitter's, paths it does not see."""
    lines = [
        f"{name} has {package} {report['versions'].get(package) or '(not installed)'}, submitted with {version}; "
        f"install {package}=={version} there, or submit with the cluster's version"
        for package, version in versions.items()
        if report["versions"].get(package) != version
    ]
    return lines + [f"{name} does not see {path}; put it where all nodes can read it" for path in report["missing"]]


def _wait(lack: Callable[[], str | None], seconds: float) -> None:
    end = time.monotonic() + seconds
    while (problem := lack()) is not None:
        if time.monotonic() > end:
            raise UserError(
                f"after {seconds:g} s {problem}; lower that, ask for more nodes, or wait longer (submit.ready_seconds)"
            )
        time.sleep(POLL_SECONDS)


def _alive(ray: Any) -> int:
    return sum(node["Alive"] for node in ray.nodes())


def _look(ray: Any, packages: list[str], paths: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each node's address, and what a task on it reports."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_report)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = [f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in nodes]
    pinned = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    reports = [task.options(scheduling_strategy=node).remote(packages, paths) for node in pinned]
    try:
        return list(zip(names, ray.get(reports, timeout=NODE_SECONDS), strict=True))
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"a node of the cluster runs no task of ours: {first}; is dmpo_dist installed there?") from None


def _report(packages: list[str], paths: list[str]) -> dict[str, Any]:
    versions = {package: _version(package) for package in packages}
    return {"versions": versions, "missing": [path for path in paths if not os.path.exists(path)]}


def _version(package: str) -> str | None:
    if package == "dmpo_dist":
        return dmpo_dist.__version__  # of the code that runs, installed or in the working directory
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU") if name in resources or name == "CPU"
    )


if __name__ == "__main__":
    main()
