"""Copies of a served model under Ray Serve: how they start, how requests reach them, and what one's death costs.

``dmpo serve`` answers HTTP in its own process and hands requests to the copies, so that a copy's death ends no
connection: scoring changes nothing, and what a dead copy had taken is asked of another one. On Kubernetes the app runs
as a deployment of its own behind Ray Serve's proxies (``application``).
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dmpo_dist.cluster.resources import WITHOUT_GPUS
from dmpo_dist.cluster.train import gpus_per_worker_of, ray_session, require_resources
from dmpo_dist.config import RunConfig, load_config
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import for_workers
from dmpo_dist.serving.backend import Backend, UnavailableError, answer
from dmpo_dist.serving.order import Served, what_is_served
from dmpo_dist.serving.service import RankingService

LOG = logging.getLogger(__name__)
APPLICATION, MODEL = "dmpo", "Model"
MOST_ONGOING = 64
"""Requests that a copy takes at a time; more wait before it, where another copy can still take them."""
PAUSE = 0.2
"""Seconds before a request that a dead copy had taken is sent again."""
AGAIN_SECONDS = 5
STALE_SECONDS = 60
"""After which a copy that answered nothing leaves the metrics."""


class Copy:
    """A copy of the model in an actor of its own.

    Args:
        served: what.
        name: of the model in answers.
    """

    def __init__(self, served: Served, name: str) -> None:
        cluster = served.config.cluster
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._service = RankingService(served)
        self._service.name = name

    async def call(self, method: str, argument: Any) -> dict[str, Any]:
        """The answer, or the message of a user's mistake, beside this copy's name and state."""
        reply: dict[str, Any] = {"copy": self._name}
        try:
            reply["answer"] = await answer(self._service, method, argument)
        except UserError as error:
            reply["mistake"] = str(error)
        return reply | {"state": await self._service.state()}

    async def check_health(self) -> None:
        """Called by Ray Serve, which starts another copy where this one raises."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine's thread has ended")


class CopiesBackend:
    """Sends requests to the copies; one that is lost with its copy is sent again until ``seconds`` have passed.

    Attributes:
        states: see ``Backend``.
    """

    def __init__(self, seconds: float, handle: Any = None) -> None:
        self._handle, self._seconds = handle, seconds
        self.states: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, float] = {}

    async def call(self, method: str, argument: Any) -> dict[str, Any]:
        """See ``Backend``."""
        from ray import serve
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        if self._handle is None:  # on Kubernetes: known once the application runs
            self._handle = serve.get_deployment_handle(MODEL, app_name=APPLICATION)
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            response = self._handle.call.remote(method, argument)
            try:
                return self._noted(await response)
            except asyncio.CancelledError:  # the client has gone
                response.cancel()
                raise
            except (RayActorError, ReplicaUnavailableError):
                LOG.warning("a copy of the model is lost; what it had been asked is asked of another one")
                await asyncio.sleep(PAUSE)
            except (BackPressureError, DeploymentUnavailableError):
                break
        raise UnavailableError("no copy of the model can answer now", AGAIN_SECONDS)

    def _noted(self, reply: dict[str, Any]) -> dict[str, Any]:
        """The answer in ``reply``, whose state is kept; raises UserError for a mistake."""
        now = time.monotonic()
        self.states[reply["copy"]], self._heard[reply["copy"]] = reply["state"], now
        for name, heard in list(self._heard.items()):
            if now - heard > STALE_SECONDS:
                del self._heard[name], self.states[name]
        if "mistake" in reply:
            raise UserError(reply["mistake"])
        return reply["answer"]


@contextmanager
def ray_backend(served: Served, console: Console) -> Iterator[Backend]:
    """``serving.replicas`` copies of the model on the joined or a local Ray cluster, ready to answer.

    Raises:
        UserError: no cluster, too few resources, or a model that cannot be loaded there.
    """
    name, serving = served.model, served.config.serving
    model, config = for_workers(served.model, served.config)
    served = replace(served, model=model, config=config, catalogue=served.catalogue and served.catalogue.absolute())
    cluster = served.config.cluster.model_copy(update={"workers": serving.replicas})
    # Ray prints a paragraph for a copy that died, of which we log a line, and complains when Serve is shut down.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Raylet is terminated|A worker died or was|ServeController")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with ray_session(cluster):
        from ray import serve

        gpus = gpus_per_worker_of(cluster)
        require_resources(cluster, gpus)
        serve.start(proxy_location="Disabled")
        try:
            with console.status(f"loading {serving.replicas} cop{'ies' if serving.replicas > 1 else 'y'} of the model"):
                handle = serve.run(copies(served, gpus, name), name=APPLICATION, route_prefix=None)
            yield CopiesBackend(serving.timeout_seconds, handle)
        except RuntimeError as error:
            if "Deploying application" not in str(error):
                raise
            raise UserError(_why_not_deployed(str(error))) from None
        finally:
            serve.shutdown()


def copies(served: Served, gpus: float, name: str) -> Any:
    """The Ray Serve application of the copies alone, each with ``gpus`` GPUs; answers call the model ``name``."""
    from ray import serve

    serving, cluster = served.config.serving, served.config.cluster
    scaling: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.most_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": serving.replicas,
                "max_replicas": serving.most_replicas,
                "target_ongoing_requests": serving.requests_per_replica,
            }
        }
    options: dict[str, Any] = {"num_cpus": cluster.cpus_per_worker, "num_gpus": gpus}
    if cluster.gpus_per_worker == 0:
        options["runtime_env"] = {"env_vars": WITHOUT_GPUS}
    deployment = serve.deployment(
        Copy, name=MODEL, max_ongoing_requests=MOST_ONGOING, health_check_period_s=2, max_constructor_retry_count=2,
        ray_actor_options=options, **scaling,
    )  # fmt: skip
    return deployment.bind(served, name)


def application(arguments: dict[str, Any]) -> Any:
    """What ``import_path: dmpo_dist.cluster.serve:application`` of a Ray Serve configuration runs.

    Args:
        arguments: ``model``, ``catalogue`` and ``settings``, a list of overrides as ``dmpo serve`` takes them.

    Raises:
        UserError: a model, catalogue or setting that cannot be served.
    """
    from ray import serve

    config = load_config([], [str(setting) for setting in arguments.get("settings", [])])
    catalogue = arguments.get("catalogue")
    served = what_is_served(arguments["model"], Path(catalogue) if catalogue else None, config)
    front = serve.deployment(serve.ingress(partial(_front, config))(), name="Front", max_ongoing_requests=1000)
    return front.bind(copies(served, config.cluster.gpus_per_worker or 0, served.model))


def _front(config: RunConfig) -> Any:
    """The HTTP app, in a process of the cluster."""
    from dmpo_dist.serving.app import make_app
    from dmpo_dist.serving.listen import read_token

    return make_app(CopiesBackend(config.serving.timeout_seconds), config.serving, read_token(config.serving))


def _why_not_deployed(text: str) -> str:
    """The user's mistake in Ray Serve's report of a failed deployment, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    return ours[-1] if ours else f"the copies of the model did not start: {lines[-1]}; try --without-ray to see why"
