"""Whether the attention backends are right on a GPU, and how fast: one call, one JSON verdict. No Ray, no network.

On the CPU (``--device cpu``) it tries the script and not the CUDA kernels.

    PYTHONPATH=.:tests python tests/gpu/prove.py --jobs 12 --json verdict.json

Three kinds of check, each by itself, so that one failure does not hide the others:

models   log-probs and all gradients of small models (grouped-query heads, windows, soft-capping, adapters, recomputed
         activations) against the oracle in fp32 on the CPU, with weights rounded to the type under test.
heads    the attention function alone over head widths and groupings, against a dense mask in fp64.
sync     that a layer of two_part never waits for the device.

In fp32 the errors have fixed limits. In bf16 and fp16 a backend may lie twice as far from the oracle as separate rows
by torch's own attention do in the same type on the same device: rounding, and nothing else.

``proven`` in the verdict of a complete run lists the backends all of whose checks passed; it belongs into ``PROVEN`` in
``dmpo_dist/modeling/routing.py``. The exit code is 0 if every check passed. ``tests/gpu/test_cuda_attention.py`` runs
the same checks under pytest.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from conftest import random_groups, tiny_model
from oracle import fused, gradient_errors, gradients, oracle, relative_error
from peft import LoraConfig, get_peft_model

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.attention import dense_attention, flex_layout_attention, two_part_attention
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import BACKENDS, Backend, choose_backend, use_backend

EXACT = 1e-5, 1e-3  # relative error of log-probs and of the worst gradient in fp32
SLACK = 2.0  # in half precision: times the error of separate rows
FUNCTIONS = {"two_part": two_part_attention, "flex": flex_layout_attention, "sdpa": dense_attention}

SHAPE = {
    "vocab": 512, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 384, "max_position_embeddings": 1024,
}  # fmt: skip


class Case(NamedTuple):
    """A small model in a type, whole or with adapters and recomputed activations, over groups of some kind."""

    kind: str
    dtype: str
    options: tuple[tuple[str, Any], ...] = ()
    adapters: bool = False
    groups: str = "ragged"

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options]
        return " ".join([self.kind, self.dtype, *options, self.groups, *(["lora+recompute"] if self.adapters else [])])


WINDOW = (("window", 48),)
SOFT_CAP = (("window", 48), ("attn_logit_softcapping", 5.0))
CASES = [
    *(Case("llama", dtype) for dtype in ("float32", "bfloat16", "float16")),
    Case("llama", "bfloat16", adapters=True),
    *(Case("llama", "bfloat16", groups=groups) for groups in ("no branch tokens", "runs of one token")),
    Case("qwen3", "bfloat16", adapters=True),
    Case("gemma3", "bfloat16", (("window", 1024),)),
    Case("gemma3", "bfloat16", WINDOW),
    Case("mistral", "float32", WINDOW),
    Case("mistral", "bfloat16", WINDOW, adapters=True),
    Case("gemma2", "float32", SOFT_CAP),
    Case("gemma2", "bfloat16", SOFT_CAP),
    Case("gemma2", "float16", SOFT_CAP, adapters=True),
]

HEADS = [(dim, 8, kv) for dim in (64, 128, 256) for kv in (8, 2)] + [(8, 4, 4), (96, 4, 1), (192, 4, 2)]
"""Head width, query heads, key heads."""


def groups_of(name: str) -> list[TokenGroup]:
    """Groups of a kind; ragged ones cross the kernels' tiles and have a group without branch tokens among them."""
    one_token = TokenGroup([5, 6, 7], ([8], [9]), (0, 0))
    if name == "no branch tokens":
        return [one_token, TokenGroup([5] * 40, ([8],), (0,))]
    if name == "runs of one token":
        return [TokenGroup([5, 6], ([7, 8], [9]), (0, 0)), one_token, TokenGroup([9] * 30, ([4, 4],), (0,))]
    many = random_groups(5, seed=1, vocab=512, prompt=300, response=24, k=7)
    return [*many[:2], one_token, *many[2:]]


def model_of(case: Case) -> Any:
    """The case's model on the CPU in fp32, its weights rounded to the case's type."""
    model: Any = tiny_model(case.kind, **SHAPE | dict(case.options))
    if case.adapters:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(getattr(torch, case.dtype)).float().train()


@cache
def expected(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The oracle's log-probs and gradients."""
    model = model_of(case)
    log_probs = oracle(model, groups_of(case.groups))
    return log_probs.detach(), gradients(model, log_probs)


@cache
def errors(case: Case, backend: Backend, device: str) -> tuple[float, float]:
    """Relative errors of the log-probs and of the worst gradient.

    Raises:
        UserError: the backend is not for this model.
    """
    model = model_of(case).to(device, getattr(torch, case.dtype))
    choose_backend(unwrap_peft(model), device, 512, backend)
    log_probs = fused(model, groups_of(case.groups), backend)
    right, right_gradients = expected(case)
    return relative_error(log_probs, right), max(gradient_errors(gradients(model, log_probs), right_gradients).values())


def check_model(case: Case, backend: Backend, device: str) -> dict[str, Any]:
    """One check of kind ``models``; its ``passed`` is None where the backend is not for this model."""
    try:
        seen = errors(case, backend, device)
    except UserError as error:
        return {"passed": None, "why": str(error)}
    limits = EXACT
    if case.dtype != "float32":
        of_rows = errors(case, "unshared", device)
        limits = SLACK * of_rows[0] + 1e-4, SLACK * of_rows[1] + 1e-3
    passed = all(error <= limit for error, limit in zip(seen, limits, strict=True))
    return {"passed": passed, "log_prob_error": seen[0], "gradient_error": seen[1], "limits": limits}


def attend(
    backend: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype, groups: str = "ragged"
) -> list[torch.Tensor]:
    """Output and gradients of q, k and v of one attention function, from the same numbers in any type."""
    dim, heads, kv = shape
    layout = prefix_layout(groups_of(groups)).to(device)
    torch.manual_seed(0)
    sizes = [(1, layout.physical_tokens, n, dim) for n in (heads, kv, kv, heads)]
    q, k, v, d_out = (torch.randn(size).to(device, torch.bfloat16).to(dtype) for size in sizes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _ = FUNCTIONS[backend](torch.nn.Module(), *(x.transpose(1, 2) for x in inputs), None, layout=layout)
    out.backward(d_out)
    return [out.detach(), *(x.grad for x in inputs)]


def check_heads(shape: tuple[int, int, int], backend: str, device: str) -> dict[str, Any]:
    """One check of kind ``heads``, in bf16."""
    if backend == "flex" and shape[0] < 16:
        return {"passed": None, "why": "flex attention takes heads of 16 or more"}
    right = attend("sdpa", shape, "cpu", torch.float64)
    plain = [relative_error(a, b) for a, b in zip(attend("sdpa", shape, device, torch.bfloat16), right, strict=True)]
    seen = [relative_error(a, b) for a, b in zip(attend(backend, shape, device, torch.bfloat16), right, strict=True)]
    limits = [SLACK * error + 1e-4 for error in plain]
    return {"passed": all(a <= b for a, b in zip(seen, limits, strict=True)), "errors": seen, "limits": limits}


def check_sync(device: str) -> dict[str, Any]:
    """That a layer of two_part, forward and backward, never waits for the device."""
    if device != "cuda":
        return {"passed": None, "why": "there is no device to wait for"}
    layout = prefix_layout(groups_of("ragged")).to(device)
    torch.cuda.synchronize()
    q = torch.randn(1, 8, layout.physical_tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(1, 2, layout.physical_tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = two_part_attention(torch.nn.Module(), q, k, k, None, layout=layout)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"passed": True}


def time_backends(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Seconds of a LoRA step's forward and backward on a packed row, and its peak memory, by backend."""
    import transformers

    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    rows, prompt, k, response = 16, 512, 15, 16
    if small:
        size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        rows, prompt, k, response = 2, 64, 3, 8
    config = transformers.LlamaConfig(**size, num_key_value_heads=size["num_attention_heads"] // 4, vocab_size=32000)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    draw = torch.Generator().manual_seed(0)
    tokens = lambda n: torch.randint(3, 32000, (n,), generator=draw).tolist()  # noqa: E731
    groups = [
        TokenGroup(tokens(prompt), tuple(tokens(response) for _ in range(k + 1)), (0,) * (k + 1)) for _ in range(rows)
    ]
    layout = prefix_layout(groups).to(device)
    module = LogProbModel(model)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for backend in BACKENDS:
        if backend == "unshared" or (backend == "flex" and device == "cpu"):
            continue  # separate rows of this batch are another comparison, `dmpo bench`
        use_backend(unwrap_peft(model), backend)
        seconds = []
        for _ in range(2 if small else 6):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wait()
            start = time.perf_counter()
            module(layout).sum().backward()
            wait()
            seconds.append(time.perf_counter() - start)
        yield {
            "backend": backend,
            "tokens": layout.physical_tokens,
            "first_seconds": seconds[0],
            "seconds": min(seconds[1:]),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        }


def all_checks(device: str, only: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Every check whose name holds ``only``, in ``jobs`` processes, each with the checks of one name."""
    names = [*(f"models: {case}" for case in CASES), *map(_heads_name, HEADS), "sync"]
    wanted = [name for name in names if only in name]
    if jobs == 1:
        return chain.from_iterable(map(partial(checks_named, device), wanted))
    _exact_fp32()
    pool = multiprocessing.get_context("spawn").Pool(jobs, initializer=_exact_fp32)
    return chain.from_iterable(pool.imap_unordered(partial(checks_named, device), wanted))


def checks_named(device: str, name: str) -> list[dict[str, Any]]:
    """The checks called ``name``, one for each backend it concerns; an exception is a failed check."""
    wanted: list[tuple[Backend, Any, tuple[Any, ...]]] = []
    for case in CASES:
        if name == f"models: {case}":
            wanted += [(backend, check_model, (case, backend, device)) for backend in BACKENDS]
    for shape in HEADS:
        if name == _heads_name(shape):
            backends: tuple[Backend, ...] = ("two_part", "flex") if device == "cuda" else ("two_part",)
            wanted += [(backend, check_heads, (shape, backend, device)) for backend in backends]
    if name == "sync":
        wanted.append(("two_part", check_sync, (device,)))
    results = []
    for backend, check, arguments in wanted:
        start = time.perf_counter()
        try:
            result = check(*arguments)
        except Exception as error:
            result = {"passed": False, "why": f"{type(error).__name__}: {str(error)[:2000]}"}
            gc.collect()  # a checkpoint that failed half-way leaves its hooks on all that follows until it is collected
        results.append({"check": name, "backend": backend, **result, "took": round(time.perf_counter() - start, 2)})
    return results


def _heads_name(shape: tuple[int, int, int]) -> str:
    return "heads: width {}, {} on {}".format(*shape)


def _exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", help="also write the verdict to this file")
    parser.add_argument("--only", default="", help="run the checks whose name holds this, such as heads or gemma2")
    parser.add_argument("--jobs", type=int, default=1, help="processes; compiling flex kernels takes most of the time")
    parser.add_argument("--no-times", action="store_true", help="leave out the speed of a 1B model")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    _exact_fp32()
    verdict: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "checks": [],
        "times": [],
    }
    for result in all_checks(device, arguments.only, arguments.jobs):
        verdict["checks"].append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)
    if not arguments.no_times:
        try:
            verdict["times"] += time_backends(device, small=device == "cpu")
        except Exception as error:
            verdict["times"].append({"why": f"{type(error).__name__}: {str(error)[:500]}"})
    outcome = {backend: [r["passed"] for r in verdict["checks"] if r["backend"] == backend] for backend in BACKENDS}
    complete = not arguments.only
    verdict["proven"] = [b for b, passed in outcome.items() if complete and True in passed and False not in passed]
    verdict["failed"] = [r for r in verdict["checks"] if r["passed"] is False]
    text = json.dumps(verdict, indent=2)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)
    return 1 if verdict["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
