"""A Ray cluster's address, before Ray tries it: Ray waits for minutes at one where nobody answers."""

import socket

from dmpo_dist.errors import UserError

ANSWER_SECONDS = 10.0


def require_answer(address: str, key: str = "cluster.address") -> None:
    """Refuse a ``host:port`` where nothing answers; other forms (``auto``, ``ray://``) are Ray's to find out.

    Raises:
        UserError: no port, an unknown name, or no answer.
    """
    if address in ("auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"{key}={address}: must be host:port, as in 10.0.0.1:6379, or auto on one of the cluster's nodes"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        reason = f"no answer in {ANSWER_SECONDS:g} s" if isinstance(error, TimeoutError) else error.strerror
        raise UserError(
            f"{key}={address}: no Ray head can be reached there ({reason}); check the address (`ray start --head` "
            "prints it, with port 6379 by default), that the head runs, and that no firewall is between"
        ) from None


def explain_refusal(address: str, error: Exception, key: str = "cluster.address") -> str:
    """What to do when Ray did not let us join the cluster at ``address``; it says why in the error's cause."""
    text = f"{error} {error.__cause__ or ''}".strip()
    if "No node info found" in text:
        return (
            f"{key}={address}: this machine is no node of that cluster, and a driver must run on one; start a node "
            f"here without resources (ray start --address={address} --num-cpus=0), or use dmpo submit --to ray"
        )
    if "Could not find any running Ray instance" in text:
        return f"{key}={address}: no Ray node runs on this machine; start one (ray start), or give the head's host:port"
    if "Failed to connect" in text or "InvalidAuthToken" in text:
        return (
            f"{key}={address}: something answers there and lets us not in; it asks for a token (set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the one the cluster was started with), or is no Ray head of "
            "this version"
        )
    first = text.splitlines()[0] if text else repr(error)
    return f"{key}={address}: cannot join the Ray cluster ({first}); check that `ray status` works there"
