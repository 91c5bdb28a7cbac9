"""How much of a GPU's peak our compiled step reaches with rows of 8 to 40 groups of Llama-3-8B's shape.

To be run where a GPU is lent, in one call:

    PYTHONPATH=.:tests:tests/gpu python tests/gpu/mfu.py --json mfu.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch

from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.implementations import BENCH_MODEL, LORA_RANK, LayoutImplementation, ModelSpec
from dmpo_dist.bench.timing import measure_peak
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.planning.flops import shape_of, shared_work, step_flops

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "vocab_size": 128256, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
PROMPT, RESPONSE, NEGATIVES = 512, 12, 7
TIMED_STEPS = 3


def measure(spec: ModelSpec, sizes: list[int], peak: float) -> Iterator[dict[str, Any]]:
    """For each number of groups in a row the milliseconds a group, MFU and peak GiB, None where it does not fit."""
    ours = LayoutImplementation(spec, True, PROMPT + RESPONSE)
    groups = random_groups(max(sizes), PROMPT, RESPONSE, NEGATIVES, spec.config["vocab_size"])
    flops = step_flops(shape_of(spec.transformers_config, LORA_RANK), shared_work(PROMPT, RESPONSE, NEGATIVES))
    for size in sizes:
        try:
            seconds, gib = _timed(ours.with_rows(size, size), groups[:size], spec.device)
        except torch.OutOfMemoryError:
            yield {"groups": size, "ms_per_group": None, "mfu": None, "peak_gib": None}
            continue
        yield {
            "groups": size,
            "ms_per_group": 1000 * seconds / size,
            "mfu": flops * size / seconds / peak,
            "peak_gib": gib,
        }


def _timed(implementation: LayoutImplementation, groups: list[TokenGroup], device: str) -> tuple[float, float | None]:
    """Median seconds of a step after one that allocates and compiles, and the peak in GiB."""
    implementation.step(groups)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(TIMED_STEPS):
        start = _now(device)
        implementation.step(groups)
        seconds.append(_now(device) - start)
    return median(seconds), torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def options(description: str, sizes: list[int]) -> argparse.ArgumentParser:
    """The command line of a script that measures rows of several ``sizes``, in groups."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script on a small model"
    )
    parser.add_argument("--groups", type=int, nargs="+", default=sizes, help="groups in a row")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", help="also write the result to this file, after every measurement")
    return parser


def run(arguments: argparse.Namespace, measured: Callable[[ModelSpec, float], Iterable[dict[str, Any]]]) -> None:
    """Print what is ``measured`` of Llama-3-8B's shape, given the peak FLOPs per second, each row as it comes."""
    cuda = arguments.device == "cuda"
    config = LLAMA3_8B if cuda else {**BENCH_MODEL, "vocab_size": 512}
    dtype = "bfloat16" if cuda else "float32"
    peak = measure_peak(arguments.device, dtype)
    spec = ModelSpec(config, arguments.device, dtype, not arguments.eager)
    result = {"torch": torch.__version__, "peak": peak, "compiled": spec.compiled, "rows": []}
    for row in measured(spec, peak["value"]):
        result["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=2)
    print(json.dumps(result, indent=2))


def main() -> None:
    arguments = options(__doc__.splitlines()[0], [8, 16, 24, 32, 40]).parse_args()
    run(arguments, lambda spec, peak: measure(spec, arguments.groups, peak))


if __name__ == "__main__":
    main()
