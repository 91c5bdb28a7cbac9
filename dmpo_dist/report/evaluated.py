"""The sections of a page about evaluations: results, paired comparisons, strata."""

from collections.abc import Iterator
from itertools import combinations

from dmpo_dist.artifacts.evaluation import SCORES_FILE
from dmpo_dist.evaluation.comparisons import below_start_lines
from dmpo_dist.evaluation.metrics import sure_hits
from dmpo_dist.evaluation.seeds import split_name
from dmpo_dist.evaluation.tables import rules_note
from dmpo_dist.formats import candidates
from dmpo_dist.records.compare import evaluation_of, paired_lines
from dmpo_dist.report import intervals, metadata, tables
from dmpo_dist.report.blocks import Block, folded_table, heading
from dmpo_dist.report.colours import page_looks
from dmpo_dist.report.gather import Material
from dmpo_dist.verdicts import rule

WAYS = {
    "popularity": "popularity of the target",
    "history": "length of the history",
    "item_cold": "how often the target was taken before",
}
MOST_PAIRS = 10  # of runs that are shown beside the pairs an evaluation compares
INTERVALS_NOTE = (
    "Best of each column in bold, the oracle apart, whether or not it is clearly ahead; intervals are 95 %, by "
    "bootstrap over users (and seeds, where there are several). A model has one colour on the whole page; baselines "
    "are grey, the oracle is a ring."
)
DIFFERENCES_NOTE = (
    "To the right of 0 the first model is better. Filled dots and bold figures are clear differences, rings are not. "
    "Models far from all others (random, untuned, oracle) are only in the table."
)


def results(material: Material) -> Iterator[Block]:
    """For each evaluation all models in a table and in figures, single seeds, and ranks in the whole catalogue."""
    looks = page_looks(material).models
    for name, e in material.evaluations.items():
        yield from heading(name, material.evaluations)
        yield from (Block("warning", f"Note: {note}") for note in e.notes)
        yield from (Block("warning", f"A model {line}") for line in below_start_lines(e.content()))
        first = tables.first_metrics(e.models)
        caption = f"All models on {e.requests} test requests, {candidates(e.negatives)} candidates"
        figures = Block("table", tables.metrics_table(caption, first, sure_hits(e.most_negatives), e.seeds))
        note = Block("note", INTERVALS_NOTE)
        yield Block("beside", ([figures, note], [Block("figures", intervals.model_drawings(e, looks))]))
        if first != e.models:
            all_metrics = tables.metrics_table("All metrics", e.models, sure_hits(e.most_negatives), e.seeds)
            yield folded_table("All metrics", all_metrics)
        if e.seeds:
            yield Block("table", tables.seeds_table(e))
        if e.rules is not None:
            by_rule = {f"{model} {rule}": m for model, rules in e.rules.models.items() for rule, m in rules.items()}
            caption = "Language models by scoring rule"
            yield Block(
                "table", tables.metrics_table(caption, tables.first_metrics(by_rule), sure_hits(e.most_negatives))
            )
            yield Block("note", f"{rules_note(e.rules.content()['chosen'])}.")
        if e.catalogue is not None:
            items = f"all {e.catalogue.items} items" if e.catalogue.items else "the whole catalogue"
            ranked = e.catalogue.all_metrics()
            few = tables.first_metrics(ranked)
            taken = "except" if e.catalogue.without_taken else "with"
            yield Block("table", tables.metrics_table(f"Among {items} {taken} those that a user had taken", few))
            if few != ranked:
                whole = tables.metrics_table(f"All metrics among {items}", ranked)
                yield folded_table("All metrics among the whole catalogue", whole)
        lines = metadata.evaluation_lines(e)
        if lines:
            yield Block("lines", lines)


def comparisons(material: Material) -> Iterator[Block]:
    """Differences between models over the same users."""
    looks = page_looks(material).models
    for name, e in material.evaluations.items():
        if e.comparisons:
            yield from heading(name, material.evaluations)
            table = Block("table", tables.comparisons_table(e))
            note = Block("note", f"{DIFFERENCES_NOTE} {rule(len(e.comparisons))}")
            drawings = Block("figures", intervals.comparison_drawings(e.comparisons, looks))
            yield Block("beside", ([table, note], [drawings]))
    pairs = _other_pairs(material)
    if pairs:
        yield Block("heading", "Other pairs of runs")
        yield Block("lines", pairs)


def strata(material: Material) -> Iterator[Block]:
    """The models' metrics on each stratum of the requests."""
    looks = page_looks(material).models
    for name, e in material.evaluations.items():
        if e.strata:
            yield from heading(name, material.evaluations)
        for way, strata in e.strata.items():
            yield Block("heading", f"By {WAYS.get(way, way.replace('_', ' '))}")
            yield Block("figures", intervals.strata_drawings(e, strata, looks))
            whole = [
                Block(
                    "table",
                    tables.metrics_table(f"{part}: {s.requests} requests", s.models, sure_hits(e.most_negatives)),
                )
                for part, s in strata.items()
            ]
            yield Block("folded", whole, "All models and metrics")


def _other_pairs(material: Material) -> list[str]:
    """Paired differences between runs that no evaluation on the page compares, from the scores in their folders.

    A run that is one seed of a model is listed as ``run (model@seed)``, as the model's name means all its seeds.
    """
    folders = material.evaluation_folders
    scored = [folder for folder in folders.values() if (folder / SCORES_FILE).exists()]
    found = {name: evaluation_of(run, scored) for name, run in material.runs.items()}
    # run -> the folder of an evaluation that ranks its model, and the model's name in that evaluation
    ranked = {name: where for name, where in found.items() if where is not None}
    by_folder = {folder: material.evaluations[name] for name, folder in folders.items()}
    labels = {
        name: f"{name} ({ranked_as})" if split_name(ranked_as)[1] else name for name, (_, ranked_as) in ranked.items()
    }
    names = list(ranked)
    pairs = []
    for i, j in combinations(range(len(names)), 2):
        (first, as_a), (second, as_b) = ranked[names[i]], ranked[names[j]]
        compared = {frozenset((c.a, c.b)) for c in by_folder[first].comparisons} if first == second else set()
        if frozenset((as_a, as_b)) not in compared:
            pairs.append((i, j))
    runs, shown = [material.runs[name] for name in names], [labels[name] for name in names]
    lines = paired_lines(runs, shown, scored, pairs[:MOST_PAIRS]) if pairs else []
    more = len(pairs) - MOST_PAIRS
    return lines + ([f"{more} more pairs: `dmpo runs compare` shows them"] if more > 0 else [])
