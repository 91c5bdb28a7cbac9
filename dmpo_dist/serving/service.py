"""A model that answers requests: titles are looked up, tokenized, scored by the engine, and put in order."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from dmpo_dist.data.candidates import require_given_candidates
from dmpo_dist.data.matching import requests_of_data
from dmpo_dist.data.requests import Catalogue, RankingRequest, read_catalogue
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.titles import as_in_data
from dmpo_dist.data.tokenization import TokenGroup, check_texts, check_titles
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import items_of
from dmpo_dist.evaluation.ranking import TitleScorer, reference_of
from dmpo_dist.explanation.contributions import title_values
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.modeling.scoring_rule import require_prior
from dmpo_dist.modeling.trie_search import Beam, best_of
from dmpo_dist.serving.catalogue import CatalogueWatch, ServedCatalogue
from dmpo_dist.serving.engine import Engine
from dmpo_dist.serving.order import Served
from dmpo_dist.serving.schema import ExplainBody, RecommendBody, RerankBody

CPU_ROW, GPU_ROW = 512, 8192
NEAREST = 1_000_000
"""Letters of a wrong title times titles of the catalogue up to which the nearest title is looked for."""
LISTED = 50
"""Most users or titles in an answer that lists them."""


@dataclass(frozen=True)
class Scored:
    """What the titles of a request are ranked by (R,), and its prompts with the titles as responses."""

    scores: np.ndarray
    groups: list[TokenGroup]


class RankingService:
    """Answers requests by one model, with the scores of ``dmpo rank``.

    Methods that answer are coroutines; any number may wait at a time. They return plain JSON values, so that they can
    be called in another process.

    Raises:
        UserError: a model, reference, template or catalogue that cannot be used.
    """

    def __init__(self, served: Served) -> None:
        config = served.config
        self.name, self._serving = served.model, config.serving
        reference = reference_of(find_model(served.model), config.ranking.reference)
        first = _catalogue_for_popularity(served) if config.ranking.popularity_weight else None
        self._scorer = TitleScorer(served.model, config, first, reference, served.given)
        self._policy, self._ranking = self._scorer.policy, config.ranking
        self._texts = self._policy.encode.texts
        if config.ranking.prior_weight:
            require_prior(self._policy.template, served.model)
        models = [self._policy, *([self._scorer.reference] if self._scorer.reference else [])]
        self._path, self._catalogue = served.catalogue, None
        if self._path is not None:
            self._catalogue = CatalogueWatch(self._path, self._accept, self._serving.reload_seconds)
        self._users: dict[str, RankingRequest] | None = None
        budget = self._serving.token_budget or (GPU_ROW if torch.cuda.is_available() else CPU_ROW)
        for model in models:
            model.score_catalogue(self._sample())  # loads the weights, and compares shared prompts with separate rows
        self.engine = Engine(models, budget, self._serving.cache_mib * 2**20)
        # The tokenizer is used by one thread at a time, beside the engine's and the one that answers.
        self._tokenizing = ThreadPoolExecutor(1, "dmpo-tokenizer")

    def close(self) -> None:
        """End all threads."""
        self._tokenizing.shutdown(cancel_futures=True)
        self.engine.close()
        if self._catalogue is not None:
            self._catalogue.close()

    async def rerank(self, body: RerankBody) -> dict[str, Any]:
        """See ``RerankAnswer``."""
        known = self._known()
        history, titles = await self._off_thread(
            lambda: self._looked_up(body.titles, body.documents, body.keep_unknown, known)
        )
        scored = await self._scores(history, titles, body.user, known)
        order = np.argsort(-scored.scores, kind="stable")[: body.top_n or None]
        results = [
            {"index": int(i), "relevance_score": float(scored.scores[i])}
            | ({"document": {"text": body.documents[i]}} if body.return_documents else {})
            for i in order
        ]
        return self._answer(results=results, cut_off=scored.groups[0].dropped, usage=_usage(scored.groups))

    async def recommend(self, body: RecommendBody) -> dict[str, Any]:
        """See ``RecommendAnswer``.

        Raises:
            UserError: there is no catalogue, or nothing of it is left.
        """
        served = self._served()
        require_given_candidates(self._policy.template, self.name, "send the titles to choose from to /v1/rerank")
        history, _ = await self._off_thread(lambda: self._looked_up(body.history, (), body.keep_unknown, served))
        titles = list(served.catalogue.titles)
        held = {*titles}
        left_out = {named: served.lookup.title(as_in_data(named)) or as_in_data(named) for named in body.exclude}
        unknown = [named for named, title in left_out.items() if title not in held]
        excluded = {*left_out.values()}
        if self._ranking.exclude_history:
            excluded |= set(history)
        allowed = np.array([title not in excluded for title in titles])
        if not allowed.any():
            raise UserError("exclude: nothing of the catalogue is left; leave some titles in")
        if self._ranking.corrections:
            scored = await self._scores(history, titles, body.user, served)
            best, groups = best_of(scored.scores, body.k, allowed), scored.groups
        else:
            best, groups = await self._searched(history, titles, body.user, body.k, allowed, served)
        results = [
            {"rank": rank, "title": titles[i], "item": served.item_of.get(titles[i]), "score": score}
            for rank, (i, score) in enumerate(best[: body.k], start=1)
        ]
        about = {"not_in_catalogue": unknown, "cut_off": groups[0].dropped, "usage": _usage(groups)}
        return self._answer(catalogue=served.version, results=results, **about)

    async def explain(self, body: ExplainBody) -> dict[str, Any]:
        """See ``ExplainAnswer``; all shortened histories are scored together."""
        known = self._known()
        history, titles = await self._off_thread(
            lambda: self._looked_up(body.history, body.documents, body.keep_unknown, known)
        )
        request = PreferenceGroup(body.user, 0, tuple(history), titles[0], tuple(titles[1:]))
        fitted = await self._off_thread(lambda: self._reading(known).encode.fit(request))
        seen = history[fitted.dropped :]
        left = len(seen) > 1 or bool(self._policy.template.render(()).text)  # something to put before a title
        shorter = [seen[:i] + seen[i + 1 :] for i in range(len(seen))] if left else []
        scores = await asyncio.gather(*(self._scores(one, titles, body.user, known) for one in [seen, *shorter]))
        table = np.stack([one.scores for one in scores])  # (1 + items, documents)
        margins = np.stack([title_values(table, i, "margin") for i in range(len(titles))], axis=1)
        contributions = margins[:1] - margins[1:]  # (items, documents), as explanation.contributions.leave_one_out
        items = [
            {"title": title, "contributions": row.tolist()} for title, row in zip(seen, contributions, strict=False)
        ]
        return self._answer(
            documents=list(titles), margins=margins[0].tolist(), history=items, cut_off=len(history) - len(seen)
        )

    async def titles(self, like: str) -> dict[str, Any]:
        """Titles of the catalogue that have ``like`` in them, those that begin with it first."""
        known = self._known()
        found = [title for title in known.catalogue.titles if like.lower() in title.lower()] if known else []
        found.sort(key=lambda title: (not title.lower().startswith(like.lower()), len(title)))
        return {"titles": found[:LISTED], "catalogue": known.version if known else None}

    async def users(self, like: str) -> dict[str, Any]:
        """Users of the prepared data whose names begin with ``like``: the latest likes of each, oldest first, and what
        else they took."""
        if self._users is None:
            self._users = await asyncio.to_thread(self._read_users)
        found = [request for user, request in self._users.items() if user.startswith(like)][:LISTED]
        return {"users": [{"user": r.user, "history": list(r.history), "taken": list(r.taken)} for r in found]}

    async def state(self) -> dict[str, Any]:
        """What /health and /metrics show of this copy of the model."""
        known, caches = self._known(), self.engine.caches
        return {
            "model": self.name,
            "lists_candidates": self._policy.template.lists_candidates,
            "catalogue": known and {"titles": len(known.catalogue.titles), "version": known.version},
            "catalogue_problem": self._catalogue.problem if self._catalogue else None,
            "separate_rows": self._policy.load_weights().trie_obstacle,
            "engine": asdict(self.engine.counts)
            | {
                "waiting": self.engine.waiting,
                "cache_hits": sum(cache.hits for cache in caches),
                "cache_misses": sum(cache.misses for cache in caches),
                "cache_bytes": sum(cache.held_bytes for cache in caches),
            },
        }

    async def _searched(
        self, history: Sequence[str], titles: list[str], user: str, top: int, allowed: np.ndarray,
        known: ServedCatalogue,
    ) -> tuple[list[Beam], list[TokenGroup]]:  # fmt: skip
        """The ``top`` best of the allowed ``titles`` by the log-probability alone, and the prompt; most of the other
        titles never run."""

        def submitted() -> tuple[list[TokenGroup], Future[list[Beam]]]:
            (group,) = self._reading(known).token_groups(history, titles, user)
            return [group], self.engine.best(group, top, allowed)

        groups, future = await self._off_thread(submitted)
        try:
            best = await asyncio.wrap_future(future)
        finally:
            future.cancel()  # of a client that has gone
        self._scorer.require_finite(np.array([beam.log_prob for beam in best]), user)
        return best, groups

    async def _scores(
        self, history: Sequence[str], titles: list[str], user: str, known: ServedCatalogue | None
    ) -> Scored:
        """What ``titles`` are ranked by after ``history``: a mean over orders, where prompts list them."""

        def submitted() -> tuple[list[TokenGroup], list[Future[np.ndarray]]]:
            groups = self._reading(known).token_groups(history, titles, user)
            futures = [self.engine.submit(group) for group in groups]
            if self._scorer.subtracted is not None:
                futures += [self.engine.submit(group, 1) for group in groups]
            if self._ranking.prior_weight:
                futures += [self.engine.submit(group) for group in self._policy.token_groups((), titles, user)]
            return groups, futures

        groups, futures = await self._off_thread(submitted)
        try:
            found = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:  # of a client that has gone
                future.cancel()
        n = len(groups)
        references = found[n : 2 * n] if self._scorer.subtracted is not None else None
        prior = np.mean(found[-n:], axis=0) if self._ranking.prior_weight else None
        popularity = known.log_popularity if known else None
        scores = self._scorer.combined(groups, titles, user, found[:n], references, prior, popularity).mean(axis=0)
        return Scored(scores, groups)

    def _looked_up(
        self, history: Sequence[str], documents: Sequence[str], keep_unknown: bool, known: ServedCatalogue | None
    ) -> tuple[list[str], list[str]]:
        """The titles that history and documents name, as prepared data has them and checked."""
        history, documents = [*map(as_in_data, history)], [*map(as_in_data, documents)]
        if known is None:
            found, titles = list(history), list(documents)
        else:
            found = []
            for named in history:
                title = known.lookup.title(named)
                if title is None and not keep_unknown:
                    raise UserError(
                        f"history: {_short(named)} is neither a title nor an item id of the catalogue"
                        f"{_nearest(known, named)}; correct it, or send keep_unknown: true to keep it as it is"
                    )
                found.append(title or named)
            titles = [known.lookup.title(named) or named for named in documents]
        check_titles([*found, *titles], self._policy.tokenizer)
        return found, titles

    def _reading(self, known: ServedCatalogue | None) -> RankingModel:
        """The policy, whose prompts show the fields in ``known`` until another request's are to be tokenized."""
        self._policy.encode.texts = known.texts if known else self._texts
        return self._policy

    async def _off_thread(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    def _accept(self, catalogue: Catalogue) -> ServedCatalogue:
        """See ``CatalogueWatch``."""
        check_titles(catalogue.titles, self._policy.tokenizer)
        texts = self._texts
        if texts.item_fields and self._path is not None:
            texts = texts.with_items(items_of(self._path))
            texts.of_items(catalogue.titles)
            check_texts(texts, self._policy.tokenizer)
        served = ServedCatalogue(catalogue, self._scorer.popularity_of(catalogue), texts)
        self._users = None  # the folder may hold other users now
        return served

    def _known(self) -> ServedCatalogue | None:
        return self._catalogue.current if self._catalogue else None

    def _served(self) -> ServedCatalogue:
        known = self._known()
        if known is None:
            raise UserError("this server has no catalogue to choose from; start it with --catalogue, or use /v1/rerank")
        return known

    def _sample(self) -> TokenGroup:
        """A few titles, to try the model on."""
        known = self._known()
        titles = list(known.catalogue.titles[:4]) if known else ["1", "2"]
        user = next(iter(self._texts.users), "")  # prompts may show fields of the user
        return self._reading(known).token_group(titles[:1], titles, user)

    def _read_users(self) -> dict[str, RankingRequest]:
        if self._path is None or not self._path.is_dir():
            return {}
        return {request.user: request for request in requests_of_data(PreparedData.load(self._path))}

    def _answer(self, **content: Any) -> dict[str, Any]:
        return {"id": uuid4().hex, "model": self.name, **content}


def _catalogue_for_popularity(served: Served) -> Catalogue:
    if served.catalogue is None:
        raise UserError("ranking.popularity_weight needs --catalogue with a column popularity, or prepared data")
    return read_catalogue(served.catalogue)


def _usage(groups: Sequence[TokenGroup]) -> dict[str, int]:
    """The tokens of a request: of its prompt, and with those of the titles that it chooses from."""
    prompt = len(groups[0].prefix)
    return {"prompt_tokens": prompt, "total_tokens": prompt + sum(map(len, groups[0].branches))}


def _nearest(known: ServedCatalogue, named: str) -> str:
    """The nearest title, where finding it takes no time that other requests would miss."""
    return known.lookup.nearest(named) if len(known.catalogue.titles) * len(named) < NEAREST else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
