"""``dmpo doctor --cluster``: compare every node of a Ray cluster with this machine and with what a run needs."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmpo_dist.cluster.resources import shortage
from dmpo_dist.config import RunConfig
from dmpo_dist.doctor.machine import MIN_DISK_GIB, MIN_SHARED_MEMORY_GIB, summary
from dmpo_dist.doctor.node import NodeProbe, NodeReport, RunPaths, own_versions
from dmpo_dist.errors import UserError

HEAD = "node:__internal_head__"
"""The resource by which Ray marks the head."""
NODE_SECONDS = 120
PINGS = 10
OBJECT_BYTES = 32 * 2**20
REDUCED_BYTES = 16 * 2**20
MAX_CLOCK_SECONDS = 1.0
MIN_MEGABYTES_PER_SECOND = 12.5
"""100 Mbit/s; ranks exchange every gradient in every step."""


@dataclass(frozen=True)
class Clock:
    """A node's clock against the head's: seconds it is ahead, and the largest error of that (half the round trips)."""

    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class NodeFindings:
    """What was found on one node; ``fetched`` is the MB/s at which it got an object from the node before it."""

    name: str
    head: bool
    ray_gpus: float
    report: NodeReport | None
    problem: str = ""
    clock: Clock | None = None
    fetched: float | None = None


def examine_cluster(config: RunConfig, console: Console) -> bool:
    """Print what was found on the nodes of the cluster at ``cluster.address`` (or RAY_ADDRESS, or of this machine).

    Returns:
        False if a problem was found.

    Raises:
        UserError: the cluster cannot be joined.
    """
    from dmpo_dist.cluster.train import gpus_per_worker_of, ray_session

    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "auto"
    cluster = config.cluster.model_copy(update={"address": address})
    with ray_session(cluster), _run_paths(config) as paths:
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        nodes.sort(key=lambda node: HEAD not in node["Resources"])
        try:
            findings, reduced = _visit(nodes, paths)
        except ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"a node was lost while it was looked at ({first}); try again, and see `ray status`"
            ) from None
        lacking = shortage(cluster, gpus_per_worker_of(cluster), ray.cluster_resources())
    problems = [line for found in findings for line in node_problems(found, own_versions(), paths)]
    problems += common_problems(findings, reduced)
    problems += [f"{lacking}; lower one of them, or add nodes"] if lacking else []
    _show(findings, reduced, paths, console)
    for problem in problems:
        console.print(Text.assemble(("problem:", "red"), f" {problem}"), highlight=False, soft_wrap=True)
    console.print(summary(problems), style="bold")
    return not problems


@contextmanager
def _run_paths(config: RunConfig) -> Iterator[RunPaths]:
    """The paths that the nodes should see; within, a marker file lies in the nearest existing parent of output_dir."""
    output = config.output_dir.absolute()
    data = config.data.path.absolute() if config.data.path is not None else None
    existing = next(p for p in (output, *output.parents) if p.exists())
    marker: Path | None = None  # where none can be written, each node reports that
    with ExitStack() as stack:
        with suppress(OSError):
            marker = Path(stack.enter_context(tempfile.NamedTemporaryFile(prefix=".dmpo-doctor-", dir=existing)).name)
        yield RunPaths(output, marker, data)


def _visit(nodes: Sequence[Mapping[str, Any]], paths: RunPaths) -> tuple[list[NodeFindings], float | str | None]:
    """Findings of each node, and the all-reduce over all: seconds, or why it failed; None on a single node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0)(NodeProbe)
    probes = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    asked = [each.look_around.remote(paths) for each in probes]
    ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)
    findings = [_first_look(node, report) for node, report in zip(nodes, asked, strict=True)]
    reached = [number for number, found in enumerate(findings) if found.report is not None]
    clocks = _clocks([probes[number] for number in reached])
    speeds = [None, *(_fetch(probes[a], probes[b]) for a, b in pairwise(reached))][: len(reached)]
    for number, clock, speed in zip(reached, clocks, speeds, strict=True):
        findings[number] = replace(findings[number], clock=clock, fetched=speed)
    return findings, _all_reduce([probes[number] for number in reached])


def _first_look(node: Mapping[str, Any], asked: Any) -> NodeFindings:
    import ray

    name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:6]})"
    head, gpus = HEAD in node["Resources"], node["Resources"].get("GPU", 0.0)
    try:
        return NodeFindings(name, head, gpus, ray.get(asked, timeout=0.1))
    except ray.exceptions.GetTimeoutError:
        return NodeFindings(name, head, gpus, None, f"no answer within {NODE_SECONDS} s")
    except ray.exceptions.RayError as error:
        return NodeFindings(name, head, gpus, None, str(error).strip().splitlines()[-1].strip())


def _clocks(probes: Sequence[Any]) -> list[Clock]:
    """Each node's clock against the first one's, from the shortest of a few round trips (as NTP does it)."""
    import ray

    against_driver = []
    for probe in probes:
        trips = []
        for _ in range(PINGS):
            began = time.time()
            there = ray.get(probe.time.remote(), timeout=NODE_SECONDS)
            ended = time.time()
            trips.append((ended - began, there - (began + ended) / 2))  # as if both ways took equally long
        trip, ahead = min(trips)
        against_driver.append((ahead, trip / 2))
    return [
        Clock(0.0, 0.0) if number == 0 else Clock(ahead - against_driver[0][0], half + against_driver[0][1])
        for number, (ahead, half) in enumerate(against_driver)
    ]


def _fetch(holder: Any, fetcher: Any) -> float:
    import ray

    held = ray.get(holder.hold.remote(OBJECT_BYTES), timeout=NODE_SECONDS)
    return OBJECT_BYTES / 1e6 / ray.get(fetcher.fetch.remote(held), timeout=NODE_SECONDS)


def _all_reduce(probes: Sequence[Any]) -> float | str | None:
    import ray

    if len(probes) < 2:
        return None
    meeting = ray.get(probes[0].meeting_point.remote(), timeout=NODE_SECONDS)
    asked = [p.all_reduce.remote(rank, len(probes), meeting, REDUCED_BYTES) for rank, p in enumerate(probes)]
    try:
        return max(ray.get(asked, timeout=NODE_SECONDS))
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None) or error
        return str(cause).strip().splitlines()[-1] if not isinstance(cause, UserError) else str(cause)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[0]


def node_problems(found: NodeFindings, own: Mapping[str, str | None], paths: RunPaths) -> list[str]:
    """What is wrong with one node, a sentence each, with what to do.

    Args:
        found: what was found on the node.
        own: versions on this machine.
        paths: what a run would use.
    """
    name, report = found.name, found.report
    if report is None:
        return [
            f"{name} runs no task of ours: {found.problem}; is dmpo_dist installed there, in this version and in the "
            "environment its `ray start` ran in?"
        ]
    problems = [
        f"{name} has {package} {report.versions.get(package) or '(not installed)'}, this machine {version}; make both "
        "environments by launch/setup_env.sh from one checkout"
        for package, version in own.items()
        if report.versions.get(package) != version
    ]
    if found.clock and abs(found.clock.ahead) - found.clock.uncertainty > MAX_CLOCK_SECONDS:
        direction = "ahead of" if found.clock.ahead > 0 else "behind"
        problems.append(
            f"{name}: its clock is {abs(found.clock.ahead):.1f} s {direction} the head's; logs and tokens go by time, "
            "turn on time synchronisation there (timedatectl set-ntp true)"
        )
    if report.shared_memory is not None and report.shared_memory < MIN_SHARED_MEMORY_GIB:
        problems.append(
            f"{name}: /dev/shm has {report.shared_memory:.2f} GiB free, Ray wants {MIN_SHARED_MEMORY_GIB:g}; enlarge "
            "it (docker run --shm-size=2g, on Kubernetes submit.kubernetes.shared_memory)"
        )
    if not found.head and found.ray_gpus != report.gpus:  # a head often keeps its GPUs from the ranks
        problems.append(
            f"{name} has {report.gpus} GPUs by nvidia-smi, and Ray counts {found.ray_gpus:g}; start its node with "
            f"ray start --num-gpus={report.gpus}"
        )
    return problems + _storage_problems(name, report, paths)


def _storage_problems(name: str, report: NodeReport, paths: RunPaths) -> list[str]:
    problems = []
    if not report.writable:
        problems.append(f"{name}: output_dir {paths.output} cannot be written there; choose another output_dir")
    elif not report.sees_marker:
        problems.append(
            f"{name} does not see what this machine writes at output_dir {paths.output}; checkpoints need a folder "
            "that all nodes share (NFS, Lustre, a mounted bucket): choose such an output_dir"
        )
    elif report.disk < MIN_DISK_GIB:
        problems.append(f"{name}: only {report.disk:.2f} GiB free at output_dir {paths.output}; make room")
    if report.data == "":
        problems.append(
            f"{name} cannot read {paths.data}/dataset.json; put the folder that dmpo data prepare wrote where all "
            "nodes can read it, and set data.path to it"
        )
    return problems


def common_problems(findings: Sequence[NodeFindings], reduced: float | str | None) -> list[str]:
    """What is wrong between the nodes."""
    problems = [
        f"{found.name} gets only {found.fetched:.1f} MB/s from the node before it in the table; look at the network "
        "(ethtool, iperf3)"
        for found in findings
        if found.fetched is not None and found.fetched < MIN_MEGABYTES_PER_SECOND
    ]
    if isinstance(reduced, str):
        problems.append(
            f"ranks on all nodes cannot add up their gradients (gloo all-reduce): {reduced}; ranks need free ports "
            "above 1024 between the nodes, and node addresses that all of them reach (ray start --node-ip-address)"
        )
    if len({found.report.data for found in findings if found.report and found.report.data}) > 1:
        problems.append("the nodes see different prepared data at data.path; copy one of them to all")
    return problems


def _show(findings: Sequence[NodeFindings], reduced: float | str | None, paths: RunPaths, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("node", "CPUs", "GPUs", "memory", "/dev/shm", "disk", "data", "clock", "fetch"):
        table.add_column(heading, justify="left" if heading == "node" else "right", overflow="fold")
    for found in findings:
        table.add_row(*_row(found))
    console.print(f"{len(findings)} nodes; the first is the head", highlight=False)
    console.print(table)
    units = "memory, free /dev/shm and free disk at output_dir in GiB; clock in ms ahead of the head"
    console.print(f"{units}; fetch: MB/s of an object from the node above", highlight=False, style="dim")
    if isinstance(reduced, float):
        speed = 2 * (len(findings) - 1) / len(findings) * REDUCED_BYTES / 1e6 / reduced
        measured = f"{reduced * 1000:.0f} ms ({speed:.0f} MB/s on the bus)"
        console.print(f"gloo all-reduce of {REDUCED_BYTES / 2**20:g} MiB over all nodes: {measured}", highlight=False)
    console.print("this machine: " + ", ".join(f"{n} {v}" for n, v in own_versions().items()), highlight=False)
    console.print(f"output_dir: {paths.output}; data.path: {paths.data or 'not set'}", highlight=False, soft_wrap=True)


def _row(found: NodeFindings) -> list[str]:
    report, clock = found.report, found.clock
    if report is None:
        return [found.name, *["-"] * 8]
    data = {None: "-", "": "no"}.get(report.data, "yes")
    shm = "-" if report.shared_memory is None else f"{report.shared_memory:.1f}"
    ahead = f"{clock.ahead * 1e3:+.1f} ±{clock.uncertainty * 1e3:.1f}" if clock and clock.uncertainty else "-"
    fetched = "-" if found.fetched is None else f"{found.fetched:.0f}"
    sizes = [f"{report.memory:.0f}", shm, f"{report.disk:.0f}"]
    return [found.name, str(report.cpus), str(report.gpus), *sizes, data, ahead, fetched]
