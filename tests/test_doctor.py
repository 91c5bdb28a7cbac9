"""``dmpo doctor --cluster``: a fault on a node becomes one sentence that names the node, and a sound node none."""

from dataclasses import replace
from pathlib import Path

import pytest

from dmpo_dist.cluster.address import require_answer
from dmpo_dist.cluster.network import require_reachable
from dmpo_dist.doctor.cluster import Clock, NodeFindings, common_problems, node_problems
from dmpo_dist.doctor.node import NodeReport, RunPaths, look_around, own_versions
from dmpo_dist.errors import UserError
from dmpo_dist.training import network

HERE = {"python": "3.11.7", "torch": "2.13.0"}
PATHS = RunPaths(Path("/shared/run"), None, Path("/shared/data"))
REPORT = NodeReport(
    HERE, cpus=8, gpus=2, memory=64, shared_memory=8, disk=50, writable=True, sees_marker=True, data="a"
)
SOUND = NodeFindings("10.0.0.2 (beta)", False, 2.0, REPORT, clock=Clock(0.9, 0.01), fetched=900.0)

FAULTS = [
    ({"versions": HERE | {"torch": "2.12.0"}}, "has torch 2.12.0, this machine 2.13.0"),
    ({"versions": HERE | {"torch": None}}, "has torch (not installed), this machine 2.13.0"),
    ({"shared_memory": 0.06}, "/dev/shm has 0.06 GiB free"),
    ({"gpus": 4}, "has 4 GPUs by nvidia-smi, and Ray counts 2"),
    ({"writable": False}, "output_dir /shared/run cannot be written there"),
    ({"sees_marker": False}, "does not see what this machine writes at output_dir /shared/run"),
    ({"disk": 0.5}, "only 0.50 GiB free"),
    ({"data": ""}, "cannot read /shared/data/dataset.json"),
]


def test_a_sound_node_has_no_problem():
    assert node_problems(SOUND, HERE, PATHS) == []
    assert common_problems([SOUND, SOUND], 0.1) == []


@pytest.mark.parametrize(("fault", "expected"), FAULTS)
def test_a_fault_of_a_node_is_named(fault, expected):
    (problem,) = node_problems(replace(SOUND, report=replace(REPORT, **fault)), HERE, PATHS)
    assert problem.startswith("10.0.0.2 (beta)")
    assert expected in problem


def test_clocks_count_only_beyond_their_uncertainty():
    late = replace(SOUND, clock=Clock(-1.5, 0.1))
    assert "its clock is 1.5 s behind the head's" in node_problems(late, HERE, PATHS)[0]
    assert node_problems(replace(SOUND, clock=Clock(-1.5, 0.6)), HERE, PATHS) == []


def test_faults_between_nodes_are_named():
    other = replace(SOUND, name="10.0.0.3 (gamma)", report=replace(REPORT, data="b"), fetched=3.0)
    slow, gloo, data = common_problems([SOUND, other], "connection refused")
    assert "10.0.0.3 (gamma) gets only 3.0 MB/s" in slow
    assert "connection refused" in gloo
    assert "different prepared data" in data
    (silent,) = node_problems(replace(SOUND, report=None, problem="No module named 'dmpo_dist'"), HERE, PATHS)
    assert "10.0.0.2 (beta) runs no task of ours: No module named 'dmpo_dist'" in silent


def test_this_machine_reports_what_it_has(tmp_path):
    (tmp_path / "marker").touch()
    report = look_around(RunPaths(tmp_path / "run", tmp_path / "marker", tmp_path / "data"))
    assert report.versions == own_versions()
    assert (report.writable, report.sees_marker, report.data) == (True, True, "")
    assert not look_around(RunPaths(tmp_path / "run", tmp_path / "gone", None)).sees_marker


# The network of several hosts


def test_gloo_takes_the_interface_of_an_address(monkeypatch):
    monkeypatch.setenv(network.VARIABLE, "")
    loopback = network.interface_of("127.0.0.1")
    assert network.interface_of("127.0.1.1") == loopback, "Debian's name for a host is on loopback, and on no list"
    assert network.interface_of("203.0.113.7") is None
    network.bind_gloo("127.0.0.1")
    assert network.os.environ[network.VARIABLE] == loopback
    network.bind_gloo("203.0.113.7")  # one that is set stays
    assert network.os.environ[network.VARIABLE] == loopback


def test_addresses_that_no_other_host_finds_are_refused(monkeypatch):
    monkeypatch.delenv(network.VARIABLE, raising=False)
    require_reachable([("alpha", "127.0.0.1")] * 2)
    require_reachable([("alpha", "10.0.0.1"), ("beta", "10.0.0.2")])
    with pytest.raises(UserError, match="beta joined the Ray cluster as 127.0.0.1.*--node-ip-address"):
        require_reachable([("alpha", "10.0.0.1"), ("beta", "127.0.0.1")])
    with pytest.raises(UserError, match="MASTER_ADDR=localhost is .* no other host finds it.*--master-addr"):
        network.bind_gloo_towards("localhost", several_hosts=True)
    with pytest.raises(UserError, match="none of its network interfaces"):
        network.bind_gloo("203.0.113.7")
    monkeypatch.setenv(network.VARIABLE, "ib7")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=ib7: .* has no interface ib7, it has .*lo"):
        network.bind_gloo("127.0.0.1")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:9", "Connection refused"), ("head", "must be host:port"), ("h:x", "must be host:port")],
)
def test_an_address_without_a_head_is_refused_at_once(address, expected):
    with pytest.raises(UserError, match=expected):
        require_answer(address)
