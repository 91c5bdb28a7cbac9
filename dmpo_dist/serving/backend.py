"""Who computes the answers of an app: a service in this process, or copies of it elsewhere (``cluster/serve.py``)."""

from typing import Any, Protocol

from pydantic import BaseModel

from dmpo_dist.serving.schema import ExplainBody, RecommendBody, RerankBody
from dmpo_dist.serving.service import RankingService

BODIES: dict[str, type[BaseModel]] = {"rerank": RerankBody, "recommend": RecommendBody, "explain": ExplainBody}
"""Method of ``RankingService`` -> what it takes; ``titles`` and ``users`` take a text, ``state`` nothing."""


class UnavailableError(Exception):
    """Nobody can answer now; the client may ask again after ``seconds``."""

    def __init__(self, reason: str, seconds: int) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Backend(Protocol):
    """Answers by any copy of the model.

    Attributes:
        states: copy -> what ``RankingService.state`` last said of it.
    """

    states: dict[str, dict[str, Any]]

    async def call(self, method: str, argument: Any) -> dict[str, Any]:
        """What the method of ``RankingService`` returns.

        Raises:
            UserError: a mistake in the request.
            UnavailableError: no copy can answer now.
        """
        ...


async def answer(service: RankingService, method: str, argument: Any) -> dict[str, Any]:
    """Call ``method`` of ``service`` with a body in JSON values, a text or nothing."""
    if method in BODIES:
        return await getattr(service, method)(BODIES[method].model_validate(argument))
    return await (service.state() if method == "state" else getattr(service, method)(argument))


class LocalBackend:
    """A service in this process."""

    def __init__(self, service: RankingService) -> None:
        self._service = service
        self.states: dict[str, dict[str, Any]] = {}

    async def call(self, method: str, argument: Any) -> dict[str, Any]:
        """See ``Backend``."""
        found = await answer(self._service, method, argument)
        self.states["local"] = await self._service.state()
        return found
