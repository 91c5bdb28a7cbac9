"""Whether a Ray cluster is large enough for the workers: before they start, and while they train."""

from collections.abc import Mapping

from dmpo_dist.config import ClusterConfig

WATCH_SECONDS = 5.0
WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that gets none of its machine's GPUs. Ray, as we start it, lets one that asked for none see
them all, and it would compute on them."""


def shortage(cluster: ClusterConfig, gpus: float, have: Mapping[str, float]) -> str | None:
    """Which resource of ``have`` is too scarce for the fewest workers with ``gpus`` each; None where all suffice."""
    for name, each, key in (("CPU", cluster.cpus_per_worker, "cpus"), ("GPU", gpus, "gpus")):
        if cluster.fewest * each > have.get(name, 0):
            which = "workers" if cluster.fewest_workers is None else "fewest_workers"
            return (
                f"cluster.{which}={cluster.fewest} with cluster.{key}_per_worker={each:g} need "
                f"{cluster.fewest * each:g} {name}s, but the cluster has {have.get(name, 0):g}"
            )
    return None


class ClusterWatch:
    """Says when the joined cluster has become too small for the workers, who then wait for another node, and when it
    is large enough again."""

    def __init__(self, cluster: ClusterConfig, gpus: float) -> None:
        self._cluster, self._gpus = cluster, gpus
        self._looked, self._short = 0.0, False

    def news(self, now: float) -> str | None:
        """What has changed since the call before; looks every few seconds only."""
        import ray

        if now - self._looked < WATCH_SECONDS:
            return None
        self._looked = now
        lacking = shortage(self._cluster, self._gpus, ray.cluster_resources())
        if (lacking is not None) == self._short:
            return None
        self._short = lacking is not None
        if lacking is None:
            return "the cluster is large enough again: the workers start from the latest checkpoint"
        return f"the cluster has lost a node: {lacking}; training waits until another one joins, or until you stop it"
