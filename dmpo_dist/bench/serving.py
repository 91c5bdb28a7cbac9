"""`dmpo bench serve`: a running server under arrivals that do not wait for it, and a Hugging Face loop beside it.

The loop scores the same prompts and titles, a row of prompt and title at a time, by the model's own logits: *plain* as
most scripts do, which compute them at every token, or *sparing*, for the title alone. Arrivals are a Poisson process.
What the loop would do with the same arrivals follows from its seconds for a request: it takes one after the other.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

from dmpo_dist.bench.serving_load import Load, Loop, Request, requests_of
from dmpo_dist.bench.timing import Turn, timed
from dmpo_dist.config import ModelConfig
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.ranking_model import RankingModel

READY = re.compile(r"serving .* at (http://\S+) \(")
READY_SECONDS = 300
LONGEST_RESPONSE = 64
COMPANY = 4
"""Requests under way at a time while the server's throughput is measured."""


def bench_serving(load: Load) -> dict[str, Any]:
    """Measure, and return the figures: ``loops``, ``server`` and a list of ``rates``.

    Raises:
        UserError: a model that cannot be served, or a prompt that is longer than all titles.
    """
    torch.set_num_threads(load.threads)
    config = ModelConfig(max_length=load.prompt + LONGEST_RESPONSE + 64, dtype=load.dtype)
    model = RankingModel.load(load.model, config)
    asked = requests_of(load, model)
    warm, first = next(asked), [next(asked) for _ in range(load.requests)]
    loop = Loop(load.model, config)
    turns: dict[str, list[Turn]] = {"plain": [], "sparing": []}
    with tempfile.TemporaryDirectory(prefix="dmpo-bench-") as folder, _server(load, config, Path(folder)) as served:
        address, process = served
        with httpx.Client(base_url=address, timeout=600) as client:
            alone, answers = [], [client.post("/v1/rerank", json=_few(warm, load)).raise_for_status()]
            for request in first:  # in turns, so that other programs of the machine disturb all alike
                for kind, of_kind in turns.items():
                    of_kind.append(loop.time(request, kind == "sparing"))
                ask = partial(client.post, request.path, json=request.body)
                alone.append(timed(lambda ask=ask: answers.append(ask().raise_for_status()), "cpu"))
        together = [next(asked) for _ in range(load.requests)]
        before = process.cpu_times()
        throughput = asyncio.run(_closed(address, together))
        cpu = sum(process.cpu_times()[:2]) - sum(before[:2])
        rates = load.rates or tuple(round(share * throughput, 3) for share in (0.3, 0.6, 0.9, 1.2))
        loops = {kind: _loop_figures(of_kind, throughput, cpu / load.requests) for kind, of_kind in turns.items()}
        rows = [_at_rate(address, rate, load, asked, loops["plain"]["seconds"]) for rate in rates if load.seconds]
    return {
        "prompt_tokens": len(first[0].group.prefix),
        "titles": len(first[0].group.branches),
        "title_tokens": sum(map(len, first[0].group.branches)),
        "requests": load.requests,
        "returning": load.returning,
        "within": load.within,
        "threads": load.threads,
        "dtype": load.dtype,
        "difference": loop.difference(first[0], answers[1].json()["results"]),
        "timed_titles": loop.timed_titles(first[0]),
        "server": {
            "alone": _percentiles([turn.seconds for turn in alone]),
            "per_second": throughput,
            "cpu_seconds": cpu / load.requests,
            "company": COMPANY,
        },
        "loops": loops,
        "rates": rows,
    }


def _loop_figures(turns: Sequence[Turn], throughput: float, server_cpu: float) -> dict[str, float]:
    """Medians for a request, and how many times as much the server does by the clock and by CPU seconds."""
    seconds, cpu = (float(np.median([turn[kind] for turn in turns])) for kind in (0, 1))
    return {"seconds": seconds, "cpu_seconds": cpu, "ratio": throughput * seconds, "ratio_cpu": cpu / server_cpu}


def _few(request: Request, load: Load) -> dict[str, Any]:
    """A short request, to warm up by."""
    return {"history": request.history, "documents": load.titles[:2]}


@contextmanager
def _server(load: Load, config: ModelConfig, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of ``dmpo serve`` in a process of its own, which ends here, and that process."""
    catalogue, log = folder / "items.jsonl", folder / "server.log"
    catalogue.write_text("".join(f'{{"title": {json.dumps(title)}}}\n' for title in load.titles), encoding="utf-8")
    command = [
        sys.executable, "-m", "dmpo_dist", "serve", load.model, "--catalogue", str(catalogue), "--without-ray",
        "serving.port=0", f"model.max_length={config.max_length}", f"model.dtype={load.dtype}",
        "serving.timeout_seconds=600",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(load.threads)}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not (found := READY.search(log.read_text(encoding="utf-8"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the server did not start: {log.read_text(encoding='utf-8').strip()[-500:]}")
            time.sleep(0.1)
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


async def _closed(address: str, requests: Sequence[Request]) -> float:
    """Requests per second with ``COMPANY`` under way at a time."""
    waiting = iter(requests)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:

        async def one_after_the_other() -> None:
            for request in waiting:
                (await client.post(request.path, json=request.body)).raise_for_status()

        start = time.perf_counter()
        await asyncio.gather(*(one_after_the_other() for _ in range(COMPANY)))
        return len(requests) / (time.perf_counter() - start)


def _at_rate(address: str, rate: float, load: Load, asked: Iterator[Request], loop: float) -> dict[str, Any]:
    """Figures of arrivals at ``rate``, of the server and of a loop that takes ``loop`` seconds for a request."""
    rng = np.random.default_rng([load.seed, round(rate * 1000)])
    arrivals = np.cumsum(rng.exponential(1 / rate, max(1, round(rate * load.seconds))))
    requests = [next(asked) for _ in arrivals]
    seconds, statuses, late = asyncio.run(_open(address, requests, arrivals))
    done = np.array([s for s, status in zip(seconds, statuses, strict=True) if status == 200])
    span = max(float(arrivals[-1]), load.seconds)
    of_loop = queued(arrivals, loop)
    return {
        "rate": rate,
        "sent": len(requests),
        "answered": len(done),
        "sent_late": late,
        "seconds": _percentiles(done),
        "goodput": float((done <= load.within).sum()) / span,
        "loop_seconds": _percentiles(of_loop),
        "loop_goodput": float((of_loop <= load.within).sum()) / span,
    }


async def _open(
    address: str, requests: Sequence[Request], arrivals: np.ndarray
) -> tuple[list[float], list[int], float]:
    """Seconds and status of each request, sent at its arrival whatever became of those before; the latest sending."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        begin, late = time.perf_counter(), 0.0

        async def send(request: Request, arrival: float) -> tuple[float, int]:
            nonlocal late
            await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
            late = max(late, time.perf_counter() - begin - arrival)
            answer = await client.post(request.path, json=request.body)
            return time.perf_counter() - begin - arrival, answer.status_code

        found = await asyncio.gather(*(send(r, float(a)) for r, a in zip(requests, arrivals, strict=True)))
    return [seconds for seconds, _ in found], [status for _, status in found], late


def queued(arrivals: np.ndarray, service: float) -> np.ndarray:
    """(n,) seconds from ``arrivals`` (ascending) to answers where each takes ``service``, one after the other."""
    free, out = 0.0, np.empty(len(arrivals))
    for index, arrival in enumerate(arrivals):
        free = max(free, float(arrival)) + service
        out[index] = free - arrival
    return out


def _percentiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    values = np.percentile(seconds, [50, 95, 99]).tolist() if len(seconds) else [None] * 3
    return dict(zip(("p50", "p95", "p99"), values, strict=True))
