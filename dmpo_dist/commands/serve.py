"""`dmpo serve`: a ranker that answers over HTTP."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import ranking_notes
from dmpo_dist.serving.backend import Backend, LocalBackend
from dmpo_dist.serving.order import Served, what_is_served
from dmpo_dist.serving.service import RankingService


def serve(model: str, catalogue: Path | None, config: RunConfig, without_ray: bool, console: Console) -> None:
    """Answer requests until a signal ends the command.

    Args:
        model: model folder or hub id.
        catalogue: see ``read_catalogue``; None takes ``data.path``, or without that what the model was trained on.
        config: gives template, model, evaluation, ranking, serving and cluster settings.
        without_ray: score in this process, rather than on ``serving.replicas`` Ray actors.

    Raises:
        UserError: missing packages, a model or catalogue that cannot be served, an address where nothing can listen, or
            no token where one is needed.
    """
    require_packages()
    from dmpo_dist.serving.app import make_app
    from dmpo_dist.serving.listen import address_of, open_socket, read_token, run_server

    token = read_token(config.serving)
    served = what_is_served(model, catalogue, config)
    for note in ranking_notes(model, served.config):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    with open_socket(config.serving) as listening, _backend(served, without_ray, console) as backend:
        address = address_of(listening)
        names = "" if served.catalogue is None else f" with the catalogue {served.catalogue}"
        console.print(f"serving {model}{names} at {address} (try it: {address}/docs)", highlight=False, soft_wrap=True)
        if token is not None:
            console.print("clients send the token as Authorization: Bearer TOKEN", highlight=False)
        run_server(make_app(backend, served.config.serving, token), listening)
    console.print("stopped", highlight=False)


def require_packages() -> None:
    """Raise UserError where the packages of the extra ``serve`` are not installed."""
    missing = [name for name in ("fastapi_offline", "prometheus_client", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"dmpo serve needs {', '.join(missing)}; install the extra serve in your clone: "
            "pip install -c constraints.txt -e '.[serve]'"
        )


def _backend(served: Served, without_ray: bool, console: Console) -> AbstractContextManager[Backend]:
    if without_ray:
        return _local(served, console)
    from dmpo_dist.cluster.serve import ray_backend

    return ray_backend(served, console)


@contextmanager
def _local(served: Served, console: Console) -> Iterator[Backend]:
    with console.status("loading the model"):
        service = RankingService(served)
    try:
        yield LocalBackend(service)
    finally:
        service.close()
