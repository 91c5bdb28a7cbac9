"""What ``dmpo plan`` predicts for a GPU, and what that GPU does: peak memory and time of a training step.

To be run where a GPU is lent, in one call, without Ray or network:

    PYTHONPATH=.:tests:tests/gpu python tests/gpu/plan.py --json plan.json

Each case trains a random Llama on one GPU, in a process of its own. A result has two parts.

memory   The plan's terms without ``framework``, in the phase that needs most, against the peak of torch's allocator
         over the steps after the warm-up (less what it held before the model was loaded). ``framework_mib`` is the
         plan's assumption for all else, ``outside_torch_mib`` what the device lacks beyond torch's allocator.
         ``reserved_mib`` is the peak with the allocator's losses, for which a plan keeps 5 % free.
time     The median of a few steps, and the plan's sum of parts. ``phases_ms`` is one further step that synchronises
         after every phase: its passes tell the MFU to compare with the assumed one, by the FLOPs that a plan counts.

Processes import while the one before them trains, and take turns on the GPU; with ``--no-times`` they share it. A
result goes to stderr and ``--json`` as it comes, and a case that fails says so there without stopping the others. With
``--device cpu`` the models are so small that the figures mean nothing.
"""

import argparse
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import dmpo_dist
from dmpo_dist.bench.step import watched_phases
from dmpo_dist.config import RunConfig
from dmpo_dist.modeling import memory
from dmpo_dist.planning.cases import Case
from dmpo_dist.planning.flops import shared_work, step_flops
from dmpo_dist.planning.gpus import find_gpu
from dmpo_dist.planning.measure import trainer_of_case
from dmpo_dist.planning.memory import peak_bytes
from dmpo_dist.planning.plan import Cluster, Lengths, Plan, changed, make_plan
from dmpo_dist.training.engine import start_process_group

MIB = 2**20
# The package of DeepSpeed configurations lies beside dmpo_dist in a checkout, and within it once that is installed.
dmpo_dist.__path__.append(str(Path(__file__).resolve().parents[2]))


@dataclass(frozen=True)
class GpuCase(Case):
    """A case that may be quantized.

    Attributes:
        quantization: of the frozen base.
        warm_up, timed: numbers of steps.
    """

    quantization: str = "none"
    warm_up: int = 2
    timed: int = 3

    def run_config(self, model: str) -> RunConfig:
        """The configuration of a run that trains the model in the folder ``model``."""
        return changed(super().run_config(model), model__quantization=self.quantization)


# 1.5 G parameters, the shape of Llama 3.2 1B with a head of its own; 13 groups of 600 tokens fill a row exactly.
LORA = GpuCase(
    "LoRA, ZeRO-2", "zero2", lora=16, hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256,
    prompt=512, response=12, negatives=7, budget=7800, dtype="bfloat16",
)  # fmt: skip
FULL = replace(LORA, name="all weights, ZeRO-2", lora=0, budget=4800)
# AdamW on a thread of the host takes seconds: fewer weights and steps.
OFFLOADED = {"layers": 4, "vocab": 32000, "warm_up": 1, "timed": 1}
CASES = (
    LORA,
    replace(LORA, name="LoRA, ZeRO-2, checkpointing", checkpointing=True),
    replace(LORA, name="LoRA, ZeRO-2, nf4", quantization="nf4"),
    replace(LORA, name="LoRA, ZeRO-3, nf4", quantization="nf4", deepspeed="zero3"),
    FULL,
    replace(LORA, name="LoRA, ZeRO-3, offload", deepspeed="zero3_offload"),
    replace(FULL, name="all weights, ZeRO-2, offload", deepspeed="zero2_offload", **OFFLOADED),
)
TINY = {
    "hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocab": 4096, "prompt": 64,
    "response": 9, "budget": 512, "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a process measures; plain data, so that it travels as JSON.

    Attributes:
        case: values of a ``GpuCase``.
        model: folder of its model.
        threads: of the CPU.
        lock: file that the processes pass on to take turns; None lets them share the device.
    """

    case: dict[str, Any]
    model: str
    threads: int
    lock: str | None


def measure(path: Path) -> None:
    """Measure the request in ``path`` as a run's only rank; writes ``result.json`` beside it."""
    import deepspeed  # noqa: F401  # slow, so before the turn
    import peft  # noqa: F401

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    request = Request(**json.loads(path.read_text()))
    torch.set_num_threads(request.threads)
    with _turn(request.lock):
        device = start_process_group()
        result = _measured(GpuCase(**request.case), request.model, device, request.lock is not None)
        (path.parent / "result.json").write_text(json.dumps(result))
        dist.destroy_process_group()


@contextmanager
def _turn(lock: str | None) -> Iterator[None]:
    """Within, no other process with this lock is on the device."""
    if lock is None:
        yield
        return
    with open(lock, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _measured(case: GpuCase, model: str, device: torch.device, times: bool) -> dict[str, Any]:
    """Bytes above those before the model was loaded, and seconds."""
    cuda = device.type == "cuda"
    (memory.keep_freed_memory if cuda else memory.return_freed_memory)()  # as training and ``dmpo plan --verify`` do
    few = torch.ones(64, 64, device=device, dtype=getattr(torch, case.dtype))
    torch.mm(few, few)  # cuBLAS takes its workspace
    memory.trim()
    base, started = memory.held_bytes(device), time.perf_counter()
    memory.reset_peak(device)
    trainer, policy = trainer_of_case(case, model, device)
    ready, loading = time.perf_counter(), memory.peak_bytes(device)
    prepared = [trainer.prepare(index) for index in range(case.warm_up + case.timed)]
    for index in range(case.warm_up):
        trainer.train_step(index, *prepared[index])
    first = memory.peak_bytes(device)
    memory.reset_peak(device)
    seconds = []
    for index in range(case.warm_up, case.warm_up + case.timed):
        trainer.watch.lap()  # waits for the device
        trainer.train_step(index, *prepared[index])
        seconds.append(trainer.watch.lap()[0])
    result = {
        "route": policy.route.backend,
        "base": base,
        "peak": memory.peak_bytes(device) - base,
        "loading": loading - base,
        "warm_up": first - base,
        "seconds": seconds,
        "setup_seconds": ready - started,
        "warm_up_and_timed_seconds": time.perf_counter() - ready,
    }
    if cuda:
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        reserved = torch.cuda.max_memory_reserved(device) - base
        result |= {"device": torch.cuda.get_device_name(device), "outside": outside, "reserved": reserved}
    phases = watched_phases(trainer, case.warm_up + case.timed, 1) if times else None
    return result | {"phases_ms": phases}


def write_models(cases: Sequence[Case], folder: Path, weights: bool) -> dict[str, Path]:
    """Write a random model for each shape among ``cases``, without ``weights`` its config.json alone; by case."""
    shapes: dict[str, Path] = {}
    for case in cases:
        shape = json.dumps(case.transformers_config)
        if shape not in shapes:
            shapes[shape] = folder / f"model-{len(shapes)}"
            shapes[shape].mkdir()
            _write_model(case, shapes[shape], weights)
    return {case.name: shapes[json.dumps(case.transformers_config)] for case in cases}


def _write_model(case: Case, folder: Path, weights: bool) -> None:
    """A few million random numbers over and over, as those of a normal initialization take a minute on the host."""
    values, dtype = dict(case.transformers_config), getattr(torch, case.dtype)
    config = AutoConfig.for_model(values.pop("model_type"), dtype=dtype, **values)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    if not weights:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    noise = (0.02 * torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0))).to(dtype)
    tensors = {
        name: noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view(p.shape)
        if p.dim() > 1
        else torch.ones(p.shape, dtype=dtype)
        for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def run(request: Request, folder: Path, environment: dict[str, str], timeout: float) -> dict[str, Any]:
    """The result of a process that measures ``request``, or ``error``, the last lines of one that failed."""
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps(asdict(request)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = environment | rank | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(request.threads)}
    command = [sys.executable, __file__, "--rank", str(folder / "request.json")]
    log = folder / "log.txt"
    try:
        with log.open("w") as out:
            subprocess.run(command, stdout=out, stderr=out, env=environment, check=True, timeout=timeout)
        return json.loads((folder / "result.json").read_text())
    except (subprocess.SubprocessError, OSError) as error:
        return {"error": [*log.read_text(errors="replace").splitlines()[-15:], str(error)]}


def predict(case: GpuCase, model: Path, gpu: str) -> Plan:
    """The plan of the command line for ``case`` on one ``gpu``, from config.json alone."""
    cluster = Cluster(gpu, find_gpu(gpu, 1), 1, 1)
    return make_plan(case.run_config(str(model)), cluster, Lengths(case.prompt, case.response, None))


def memory_of(plan: Plan, result: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured MiB."""
    counted = [term for term in plan.terms if term.name != "framework"]
    predicted = peak_bytes(counted)
    out: dict[str, Any] = {"predicted_mib": predicted / MIB, "phase": plan.phase}
    if "peak" in result:
        out |= {"measured_mib": result["peak"] / MIB, "ratio": predicted / result["peak"]}
    out["framework_mib"] = (plan.peak - predicted) / MIB
    for key in ("outside", "reserved", "base", "loading", "warm_up"):
        if key in result:
            out["outside_torch_mib" if key == "outside" else f"{key}_mib"] = result[key] / MIB
    return out | {"terms_mib": {f"{t.name} ({', '.join(sorted(t.phases))})": t.bytes / MIB for t in counted}}


def time_of(plan: Plan, result: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured seconds of a step, and shares of the device's peak."""
    step, gpu = plan.step, plan.cluster.gpu
    peak = gpu.peak(step.dtype)
    parts = {part.name: 1000 * part.seconds for part in plan.durations}
    out: dict[str, Any] = {"predicted_s": plan.seconds, "parts_ms": parts, "assumed_mfu": gpu.mfu_at(step.shape.hidden)}
    if "seconds" not in result:
        return out
    seconds, row = median(result["seconds"]), step.row
    useful = step_flops(step.shape, shared_work(row.prompt, row.response, row.negatives), step.reference)
    out |= {"measured_s": seconds, "ratio": plan.seconds / seconds, "steps_s": result["seconds"]}
    out |= {"mfu_of_step": useful * step.groups / seconds / peak, "phases_ms": result["phases_ms"]}
    if result["phases_ms"]:
        passes = sum(result["phases_ms"][name] for name in ("reference", "policy", "backward")) / 1000
        out["mfu_of_passes"] = sum(step.flops().values()) * step.groups / passes / peak
    return out | {key: result[key] for key in ("setup_seconds", "warm_up_and_timed_seconds")}


def compare(case: GpuCase, model: Path, gpu: str, result: dict[str, Any], times: bool) -> dict[str, Any]:
    """One line of the output; an error of the planner is recorded like one of the process."""
    line: dict[str, Any] = {"name": case.name, "gpu": gpu}
    line |= {key: result[key] for key in ("device", "error") if key in result}
    try:
        plan = predict(case, model, gpu)
        line |= {"route": [plan.route.backend, result.get("route")], "groups": plan.step.groups}
        line |= {"parameters": plan.blueprint.sizes.total, "trainable": plan.blueprint.sizes.trainable}
        line["memory"] = memory_of(plan, result)
        if times:
            line["time"] = time_of(plan, result)
    except Exception as error:  # whatever it is, the other cases go on
        line["planner_error"] = repr(error)
    return line


def compare_all(
    cases: Sequence[GpuCase], folder: Path, arguments: argparse.Namespace, environment: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The lines of ``cases``, as they come."""
    gpu = "cpu" if arguments.device == "cpu" else arguments.gpu
    models = write_models(cases, folder, weights=not arguments.plan_only)
    if arguments.plan_only:
        yield from (compare(case, models[case.name], gpu, {}, True) for case in cases)
        return
    lock = None if arguments.no_times else str(folder / "lock")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {}
        for number, case in enumerate(cases):
            request = Request(asdict(case), str(models[case.name]), arguments.threads, lock)
            future = pool.submit(run, request, folder / f"case-{number}", environment, arguments.timeout)
            running[future] = case
        for case in cases:  # while the processes work: what takes long in a plan is kept for the call below
            compare(case, models[case.name], gpu, {}, False)
        for future in as_completed(running):
            case = running[future]
            yield compare(case, models[case.name], gpu, future.result(), not arguments.no_times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script on tiny models")
    parser.add_argument("--gpu", default="h200-141g", help="the GPU's name for dmpo plan")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of cases")
    parser.add_argument("--jobs", type=int, default=3, help="processes that are there at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process; training takes 1 by default")
    parser.add_argument("--timeout", type=float, default=150, help="seconds of a process, with its wait for a turn")
    parser.add_argument("--no-times", action="store_true", help="memory alone: all jobs share the device")
    parser.add_argument("--plan-only", action="store_true", help="predictions alone; needs no GPU")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.rank)
        return
    cpu = arguments.device == "cpu"
    cases = [replace(case, **TINY) if cpu else case for case in CASES]
    cases = [case for case in cases if any(part.lower() in case.name.lower() for part in arguments.only)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    environment = dict(os.environ) | {"DS_ACCELERATOR": arguments.device} | (hidden if cpu else {})
    os.environ.update(hidden)  # this process only plans, and must take no memory of the GPU
    lines = []
    with tempfile.TemporaryDirectory(prefix="dmpo-plan-") as folder:
        for line in compare_all(cases, Path(folder), arguments, environment):
            lines.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(lines, indent=2), encoding="utf-8")
    sys.exit(any("error" in line or "planner_error" in line for line in lines))


if __name__ == "__main__":
    main()
