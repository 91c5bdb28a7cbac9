"""Which network interface the ranks of several hosts meet on.

Left alone, gloo takes the address that the host's own name resolves to. Debian and Ubuntu write 127.0.1.1 there, and
many containers 127.0.0.1: two hosts then wait for each other on their own loopback. (NCCL looks for an interface by
itself.)
"""

import ipaddress
import os
import socket

import psutil

from dmpo_dist.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"


def bind_gloo(address: str) -> None:
    """Make this process's gloo use the interface that holds ``address``, this host's own; one that is set stays.

    Raises:
        UserError: GLOO_SOCKET_IFNAME names an interface that is not there, or no interface holds the address.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        _require(chosen.split(","))
        return
    name = interface_of(address)
    if name is None:
        raise UserError(
            f"{socket.gethostname()}: none of its network interfaces ({', '.join(_interfaces())}) holds {address}, the "
            f"address other hosts know it by; set {VARIABLE} to the interface that reaches them (submit.env, or before "
            "`ray start`)"
        )
    os.environ[VARIABLE] = name


def bind_gloo_towards(host: str, several_hosts: bool) -> None:
    """Make this process's gloo use the interface from which it reaches ``host``, where the ranks meet.

    Raises:
        UserError: see ``bind_gloo``; there is no way to it, or it is loopback and the ranks are on ``several_hosts``.
    """
    address = own_address_towards(host)
    if several_hosts and _is_loopback(address) and not os.environ.get(VARIABLE):
        raise UserError(
            f"MASTER_ADDR={host} is {address} on {socket.gethostname()}, where no other host finds it; give torchrun "
            f"the address that others reach it by (--master-addr=10.0.0.1), or set {VARIABLE}"
        )
    bind_gloo(address)


def own_address_towards(host: str) -> str:
    """The address this machine sends from to reach ``host``, by its routing table; no packet is sent.

    Raises:
        UserError: the name does not resolve, or there is no way there.
    """
    try:
        family, kind, protocol, _, endpoint = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(endpoint)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host} cannot be reached from {socket.gethostname()} ({error.strerror}); "
            "give an address that all hosts see"
        ) from None


def interface_of(address: str) -> str | None:
    """Name of the interface that holds ``address``; None where none does."""
    plain = "127.0.0.1" if _is_loopback(address) else address.partition("%")[0]  # 127.0.1.1 is on lo, and not listed
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == plain for entry in entries):
            return name
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _require(names: list[str]) -> None:
    lacking = [name for name in names if name not in _interfaces()]
    if lacking:
        raise UserError(
            f"{VARIABLE}={','.join(names)}: {socket.gethostname()} has no interface {lacking[0]}, it has "
            f"{', '.join(_interfaces())}; hosts name theirs differently, so leave it unset (each takes the one that "
            "holds its own address)"
        )


def _interfaces() -> list[str]:
    return sorted(psutil.net_if_addrs())
