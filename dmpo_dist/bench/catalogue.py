"""`dmpo bench catalogue`: the speed-up of scoring a catalogue behind one shared prompt over scoring it row by row.

It also compares the scores of both ways, and measures the search for the best titles alone against scoring all.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dmpo_dist.bench.memory import peak_above
from dmpo_dist.bench.timing import timed
from dmpo_dist.config import ModelConfig, ScratchModel, Simulator
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import make_scratch_model
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.modeling.token_scorer import TokenScorer
from dmpo_dist.modeling.trie_search import Beam, best_of

SUBSET = 64
"""Separate rows are timed and compared on this many titles; their time is scaled up to all titles."""
BENCH_SCRATCH = ScratchModel(hidden_size=384, layers=6, heads=6, intermediate_size=1024, vocab_size=4096)
LONGEST_RESPONSE = 256


@dataclass(frozen=True)
class CatalogueBench:
    """The measurements; times are medians over the rounds, in seconds for all titles of one user.

    Attributes:
        titles, tokens, nodes, inner: numbers of titles, of their tokens, of trie nodes, and of nodes that run.
        prompt: tokens of the prompt.
        shared, separate: seconds by the clock; ``separate`` is ``scaled`` times the seconds of a subset.
        shared_cpu, separate_cpu: CPU seconds of this process, in the same way.
        top, best, best_cpu: titles that were searched for, and the seconds that the exact search for them took.
        best_run: tokens behind the prompt that this search ran.
        scaled: all titles / titles in the subset.
        error: largest relative difference of a title's log-prob on the subset, and of the best from the search.
        shared_mib, separate_mib: peak memory in MiB above the memory of the model.
    """

    titles: int
    tokens: int
    nodes: int
    inner: int
    prompt: int
    shared: float
    separate: float
    shared_cpu: float
    separate_cpu: float
    top: int
    best: float
    best_cpu: float
    best_run: int
    scaled: float
    error: float
    shared_mib: float
    separate_mib: float


def bench_catalogue(
    model: str | None, titles: list[str] | None, count: int, prompt: int, top: int, token_budget: int, threads: int,
    rounds: int,
) -> CatalogueBench:  # fmt: skip
    """Time all ways in turn on one user.

    Args:
        model: model folder; None makes a Llama of 6 layers with random weights.
        titles: the catalogue; None makes titles up.
        count: number of titles to score.
        prompt: least tokens of the prompt; titles are added to the history until it has as many.
        top: how many best titles are searched for.
        token_budget: most tokens in a row, for all ways.
        threads: CPU threads; 0 for torch's default.
        rounds: how often each way is timed.

    Raises:
        UserError: a model that cannot be loaded or whose prompt cannot be shared, or too few titles.
    """
    if threads:
        torch.set_num_threads(threads)
    titles = titles or simulate(Simulator(users=2, items=count, events_per_user=2), 0).items["title"].tolist()
    if len(titles) < count:
        raise UserError(f"--titles {count}: the catalogue has {len(titles)}; lower it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(max_length=prompt + LONGEST_RESPONSE)
    with tempfile.TemporaryDirectory(prefix="dmpo-bench-") as folder:
        if model is None:
            model = folder
            make_scratch_model(Path(folder), BENCH_SCRATCH, titles, config.max_length, seed=0)
        ranking_model = RankingModel.load(model, config, None, token_budget)
        group = _group(ranking_model, titles[:count], prompt)
        shared = ranking_model.load_weights()
        by_rows = config.model_copy(update={"attention": "unshared"})
        separate = RankingModel.load(model, by_rows, None, token_budget).load_weights()
    if shared.trie_obstacle:
        raise UserError(f"{model}: {shared.trie_obstacle}, so there is nothing to compare")
    size = min(SUBSET, count)
    pick = np.linspace(0, count - 1, size).astype(int)
    subset = TokenGroup(group.prefix, tuple(group.branches[i] for i in pick), tuple(group.scored_from[i] for i in pick))
    return _measure(shared, separate, group, subset, pick, top, device, rounds)


def _measure(
    shared: TokenScorer,
    separate: TokenScorer,
    group: TokenGroup,
    subset: TokenGroup,
    pick: np.ndarray,
    top: int,
    device: torch.device,
    rounds: int,
) -> CatalogueBench:
    few = TokenGroup(group.prefix, subset.branches[:2], subset.scored_from[:2])
    shared.score_many(few), separate.score_many(few)  # first calls compare, and allocate
    scores, shared_mib = peak_above(lambda: shared.score_many(group), device)
    expected, separate_mib = peak_above(lambda: separate.score_many(subset), device)
    best: list[Beam] = []
    run = _tokens_run(shared, lambda: best.extend(shared.best_titles(group, top)))
    seen = np.array([*scores[pick], *(beam.log_prob for beam in best[:top])])
    expected = np.array([*expected, *(beam.log_prob for beam in best_of(scores, top)[:top])])
    error = float(np.max(np.abs(seen - expected) / np.abs(expected)))
    turns = [
        (
            timed(lambda: shared.score_many(group), device),
            timed(lambda: separate.score_many(subset), device),
            timed(lambda: shared.best_titles(group, top), device),
        )
        for _ in range(rounds)
    ]
    scaled = len(group.branches) / len(subset.branches)
    ours, cpu, other, other_cpu, search, search_cpu = (
        statistics.median(turn[way][kind] for turn in turns) for way in range(3) for kind in range(2)
    )
    trie = shared.trie(group)
    return CatalogueBench(
        titles=len(group.branches),
        tokens=sum(map(len, group.branches)),
        nodes=len(trie.token),
        inner=len(trie.inner),
        prompt=len(group.prefix),
        shared=ours,
        separate=other * scaled,
        shared_cpu=cpu,
        separate_cpu=other_cpu * scaled,
        top=top,
        best=search,
        best_cpu=search_cpu,
        best_run=run - len(group.prefix) + 1,
        scaled=scaled,
        error=error,
        shared_mib=shared_mib,
        separate_mib=separate_mib,
    )


def show(result: CatalogueBench, console: Console) -> None:
    """Print a table and the conditions of the measurement."""
    table = Table("", "seconds", "CPU seconds", "MiB above the model", title="One user, all titles")
    table.add_row("prompt shared", f"{result.shared:.2f}", f"{result.shared_cpu:.2f}", f"{result.shared_mib:.0f}")
    table.add_row("separate rows", f"{result.separate:.1f}", f"{result.separate_cpu:.1f}", f"{result.separate_mib:.0f}")
    table.add_row(
        "ratio", f"{result.separate / result.shared:.1f}", f"{result.separate_cpu / result.shared_cpu:.1f}", ""
    )
    table.add_row(f"best {result.top} alone", f"{result.best:.2f}", f"{result.best_cpu:.2f}", "")
    table.add_row("all / best", f"{result.shared / result.best:.1f}", f"{result.shared_cpu / result.best_cpu:.1f}", "")
    console.print(table)
    console.print(
        f"{result.titles} titles of {result.tokens} tokens, {result.nodes} distinct beginnings, {result.inner} of them "
        f"run; prompt of {result.prompt} tokens. Separate rows were timed on {round(result.titles / result.scaled)} "
        f"titles and scaled by {result.scaled:.1f}; log-probs differ by at most {result.error:.1e} of their size. "
        f"The exact search for the best {result.top} ran {result.best_run} beginnings, "
        f"{result.best_run / result.inner:.1%} of those that all titles need.",
        highlight=False,
    )


def _tokens_run(scorer: TokenScorer, run: Callable[[], object]) -> int:
    """How many tokens go through the model of ``scorer`` while ``run`` runs."""
    counts: list[int] = []
    embeddings = scorer.writer().get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    try:
        run()
    finally:
        hook.remove()
    return sum(counts)


def _group(model: RankingModel, titles: list[str], prompt: int) -> TokenGroup:
    for length in range(1, len(titles) + 1):
        history = titles[:length]
        if len(model.token_group(history, titles[:1], "bench").prefix) >= prompt:
            return model.token_group(history, titles, "bench")
    raise UserError(f"--prompt {prompt}: all titles together are shorter; lower it")
