"""``dmpo plan``: make a plan, print it, and advise what to change."""

import json
from dataclasses import dataclass, replace

from rich.console import Console

from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, with_length_of
from dmpo_dist.planning.cases import CASES
from dmpo_dist.planning.gpus import find_gpu
from dmpo_dist.planning.lengths import data_lengths
from dmpo_dist.planning.model import SCRATCH
from dmpo_dist.planning.plan import Cluster, Lengths, Plan, data_groups, make_plan
from dmpo_dist.planning.recommend import Advice, elsewhere, faster, smallest_change
from dmpo_dist.planning.report import BYTES, amount, as_dict, show_advice, show_outcomes, show_plan
from dmpo_dist.planning.verify import Outcome, verify
from dmpo_dist.training.job import Kind

ASSUMED_GPU, ASSUMED_PER_NODE = "h100-80g", 8
USUAL_RESPONSE = 12


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    Attributes:
        gpu, nodes, gpus_per_node: the cluster; None takes the assumed one.
        prompt, response: tokens; None takes those of the data, or without it 12 for a response and the longest prompt
            that ``model.max_length`` allows.
        groups: number of training groups; None counts those in ``data.path``.
    """

    gpu: str | None
    nodes: int
    gpus_per_node: int | None
    prompt: int | None
    response: int | None
    groups: int | None
    kind: Kind = "preference"


def run_plan(config: RunConfig, request: Request, explain: bool, as_json: bool, console: Console) -> None:
    """Print the plan of a stage with ``config``.

    Raises:
        UserError: unknown GPU, a model or settings that cannot be planned, or a run that does not fit, with what to
            change.
    """
    config = with_length_of_start(config)
    gpu, per_node = request.gpu or ASSUMED_GPU, request.gpus_per_node or ASSUMED_PER_NODE
    cluster = Cluster(gpu, find_gpu(gpu, per_node), request.nodes, per_node)
    lengths = _lengths(config, request)
    plan = make_plan(config, cluster, lengths, request.kind)
    advice = faster(plan, lengths) if plan.fits else smallest_change(plan, lengths)
    if as_json:
        print(json.dumps(as_dict(plan, advice), indent=1))
    else:
        show_plan(plan, explain, console, _assumed(request), _of_lengths(lengths, request))
        if advice is not None:
            show_advice("faster" if plan.fits else "to fit", advice, console)
    if not plan.fits:
        raise UserError(_what_to_change(plan, advice, lengths))


def run_verify(console: Console) -> bool:
    """Predict and measure ``CASES`` and print the table; returns whether all are within the tolerance."""
    outcomes: list[Outcome] = []
    for outcome in verify(CASES):
        outcomes.append(outcome)
        console.print(
            f"{len(outcomes)} of {len(CASES)}: {outcome.case.name}, predicted {outcome.predicted / 2**20:,.0f} MiB, "
            f"measured {outcome.measured / 2**20:,.0f} MiB",
            highlight=False,
        )
    show_outcomes(outcomes, console)
    return all(outcome.good for outcome in outcomes)


def with_length_of_start(config: RunConfig) -> RunConfig:
    """``config`` with the ``model.max_length`` that training would take where none was set."""
    if config.model.path == SCRATCH:
        return config
    return with_length_of([find_model(config.model.path, weights=False)], config)


def _assumed(request: Request) -> str:
    """A text on the flags of the cluster that were left out; "" where all were given."""
    flags = {"--gpu": request.gpu, "--gpus-per-node": request.gpus_per_node}
    missing = [flag for flag, value in flags.items() if value is None]
    return (
        f"assumed, not looked for on this machine: give {' and '.join(missing)} (and --nodes) for yours"
        if missing
        else ""
    )


def _lengths(config: RunConfig, request: Request) -> Lengths:
    """Lengths as asked for, else those of the data, else the longest allowed."""
    groups, longest = data_groups(config, request.groups), config.model.max_length
    if request.prompt is None and request.response is None:
        counted = data_lengths(config, request.kind)
        if counted is not None:
            return replace(counted, groups=groups)
    response = request.response or USUAL_RESPONSE
    prompt = longest - response if request.prompt is None else request.prompt
    if prompt < 1 or prompt + response > longest:
        raise UserError(
            f"--prompt {prompt} and --response {response} do not fit into model.max_length={longest}; lower them or "
            "raise it"
        )
    return Lengths(prompt, response, groups)


def _of_lengths(lengths: Lengths, request: Request) -> str:
    """Where the lengths come from; "" where both were given."""
    if lengths.counted:
        return (
            f"means of {lengths.counted} training groups of the data; the longest has {lengths.longest} tokens of "
            "prompt and response"
        )
    missing = [flag for flag, value in (("--prompt", request.prompt), ("--response", request.response)) if not value]
    why = "the longest that model.max_length allows" if request.prompt is None else "assumed"
    return f"{why}: give {' and '.join(missing)}, or a data.path and a model whose tokenizer is here" if missing else ""


def _what_to_change(plan: Plan, advice: Advice | None, lengths: Lengths) -> str:
    short = amount(plan.peak - plan.cluster.capacity, BYTES)
    what = f"the run needs {short} more than a {plan.cluster.name} has to give"
    if advice is not None:
        return f"{what}; it fits with {' '.join(advice.change.keys)}"
    flags = elsewhere(plan, lengths)
    where = f"it would fit with {' or '.join(flags)} at its smallest" if flags else "no GPU in the table would do"
    return f"{what}, and no ZeRO stage, row length, quantization, offload or adapter makes it fit; {where}"
