"""Ray Train's process group on the network that the cluster's nodes share."""

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

from dmpo_dist.errors import UserError
from dmpo_dist.training.network import bind_gloo


@dataclass
class NodeNetworkConfig(TorchConfig):
    """``TorchConfig`` whose ranks meet on the interface that holds their node's address in Ray.

    ``Backend.on_start`` is the last moment before the process group: gloo reads its interface when it starts.
    """

    backend: str = "gloo"

    @property
    def backend_cls(self) -> Any:
        return _on_node_network(super().backend_cls)


def _on_node_network(backend: Any) -> Any:
    class NodeNetworkBackend(backend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            require_reachable(worker_group.execute(_node))
            if "nccl" not in backend_config.backend:
                worker_group.execute(_bind_gloo_to_node)
            super().on_start(worker_group, backend_config)

    return NodeNetworkBackend


def require_reachable(nodes: Iterable[tuple[str, str]]) -> None:
    """Refuse ranks on several hosts of which one is known by a loopback address.

    Args:
        nodes: host name and address in Ray of each rank's node.

    Raises:
        UserError: there is one.
    """
    known = sorted(set(nodes))
    if len({host for host, _ in known}) == 1:
        return
    for host, address in known:
        if ipaddress.ip_address(address).is_loopback:
            raise UserError(
                f"the ranks are on {len(known)} hosts, but {host} joined the Ray cluster as {address}, where no other "
                "host finds it (it has no default route); start its node with ray start --node-ip-address=ITS_ADDRESS"
            )


def _node() -> tuple[str, str]:
    import ray.util

    return socket.gethostname(), ray.util.get_node_ip_address()


def _bind_gloo_to_node() -> None:
    bind_gloo(_node()[1])
