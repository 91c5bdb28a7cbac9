"""What `dmpo bench serve` asks of a server, and the Hugging Face loop that is asked the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dmpo_dist.bench.timing import Turn, timed
from dmpo_dist.config import ModelConfig, Simulator
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import load_for_scoring
from dmpo_dist.modeling.ranking_model import RankingModel

LOOP_TITLES = 4
"""Titles of a request that the loop is timed on, where a request has more; its time is scaled up to all."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server.

    Attributes:
        model: model folder.
        titles: the catalogue.
        prompt: least tokens of a prompt: titles are added to a history until it has as many.
        candidates: titles ranked in a request; 0 for the whole catalogue.
        returning: share of requests of a user who was there shortly before.
        requests: of each measurement without arrivals.
        rates: requests per second of the arrivals; none for shares of the measured throughput.
        seconds: of arrivals at each rate.
        within: an answer is in time after at most so many seconds.
        threads: CPU threads of server and loop.
        dtype: of the weights, likewise.
        seed: of histories, candidates and arrivals.
    """

    model: str
    titles: list[str]
    prompt: int
    candidates: int
    returning: float
    requests: int
    rates: tuple[float, ...]
    seconds: float
    within: float
    threads: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One request, as the server takes it and as token ids."""

    history: list[str]
    documents: list[str]
    titles: list[str]
    group: TokenGroup

    @property
    def branch_of(self) -> dict[str, list[int]]:
        """Title -> its token ids after the prompt."""
        return dict(zip(self.titles, self.group.branches, strict=True))

    @property
    def path(self) -> str:
        return "/v1/rerank" if self.documents else "/v1/recommend"

    @property
    def body(self) -> dict[str, Any]:
        return {"history": self.history} | ({"documents": self.documents} if self.documents else {"k": 10})


class Loop:
    """A model as most scripts use it: a forward pass for every title, its own logits, a softmax."""

    def __init__(self, model: str, config: ModelConfig) -> None:
        self._model = load_for_scoring(model, config)

    @staticmethod
    def timed_titles(request: Request) -> int:
        """How many titles of ``request`` are timed."""
        return min(LOOP_TITLES, len(request.group.branches))

    def time(self, request: Request, sparing: bool) -> Turn:
        """Of all titles of ``request``."""
        count = self.timed_titles(request)

        def some() -> None:
            for branch in request.group.branches[:count]:
                self.score(request.group.prefix, branch, sparing)

        turn, scale = timed(some, "cpu"), len(request.group.branches) / count
        return Turn(turn.seconds * scale, turn.cpu_seconds * scale)

    @torch.no_grad()
    def score(self, prefix: Sequence[int], branch: Sequence[int], sparing: bool = True) -> float:
        """Log-prob of ``branch`` after ``prefix``."""
        ids = torch.tensor([[*prefix, *branch]])
        kept = len(branch) + 1 if sparing else 0  # 0 is for all
        logits = self._model(ids, logits_to_keep=kept).logits[0, -len(branch) - 1 : -1]
        return float(logits.float().log_softmax(-1)[torch.arange(len(branch)), torch.tensor(branch)].sum())

    def difference(self, request: Request, results: Sequence[dict[str, Any]]) -> float:
        """The largest difference between a score of the server and the loop's, in nats."""
        if request.documents:
            theirs = {result["index"]: result["relevance_score"] for result in results}
            ours = {index: self.score(request.group.prefix, request.group.branches[index]) for index in theirs}
            return max(abs(ours[index] - theirs[index]) for index in theirs)
        theirs = {result["title"]: result["score"] for result in results[:2]}
        ours = {title: self.score(request.group.prefix, request.branch_of[title]) for title in theirs}
        return max(abs(ours[title] - theirs[title]) for title in theirs)


def requests_of(load: Load, model: RankingModel) -> Iterator[Request]:
    """Histories of ``load.prompt`` tokens or a few more, without end."""
    rng = np.random.default_rng(load.seed)
    recent: list[tuple[list[str], list[str]]] = []
    while True:
        if recent and rng.random() < load.returning:
            history, rest = recent[rng.integers(len(recent))]
        else:
            order = [load.titles[i] for i in rng.permutation(len(load.titles))]
            length = _length(model, order, load.prompt)
            history, rest = order[:length], order[length:]
            recent = [*recent[-7:], (history, rest)]
        if load.candidates > len(rest):
            raise UserError(f"--candidates {load.candidates}: {len(rest)} titles are left beside a history; lower it")
        documents = [rest[i] for i in rng.choice(len(rest), load.candidates, replace=False)] if load.candidates else []
        titles = documents or load.titles
        yield Request(history, documents, titles, model.token_group(history, titles))


def _length(model: RankingModel, titles: list[str], prompt: int) -> int:
    """How many of ``titles`` make a prompt of ``prompt`` tokens."""
    for length in range(1, len(titles)):
        if len(model.token_group(titles[:length], titles[:1]).prefix) >= prompt:
            return length
    raise UserError(f"--prompt {prompt}: all titles together are shorter; lower it")


def made_up_titles(count: int) -> list[str]:
    """``count`` different titles."""
    return simulate(Simulator(users=2, items=count, events_per_user=2), 0).items["title"].tolist()
