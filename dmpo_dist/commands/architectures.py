"""Which model families share their prompt here, and how exactly: measured on tiny random models of each.

A family's attention says little in words. So each one is built small, its route taken as training would take it, and
its log-probs and gradients compared with what no layout of ours has touched: one full, unpadded row for each response
through the model's own logits.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.batching.layout import lay_out
from dmpo_dist.commands.every_family import VARIANTS, model_types, tiny_options
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import Backend, choose_backend, native_attention, use_backend
from dmpo_dist.modeling.self_check import disagreement
from dmpo_dist.modeling.suitability import require_deterministic, silence
from dmpo_dist.parsing import first_line

LOG_PROB_LIMIT = 1e-5
"""Largest relative error of the log-probs of a family that may be used, in fp32."""
GRADIENT_LIMIT = 1e-4
"""The same for the worst parameter's gradient."""

VOCABULARY = 97

UNMEASURED = ("refused", "not built")


class Family(NamedTuple):
    """A tiny configuration: its name in the table, transformers' name of it, and what it sets beyond ``SMALL``."""

    name: str
    model_type: str
    options: dict[str, Any] = {}  # noqa: RUF012  read only


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SHORT: dict[str, Any] = {"sliding_window": 8}
LONG: dict[str, Any] = {"sliding_window": 64}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1}  # layers from this one on have the window
GEMMA = {"query_pre_attn_scalar": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA_NET = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
CHUNKED = {
    "attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2,
    "intermediate_size_mlp": 48,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16,
}  # fmt: skip
HYBRID = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip

FAMILIES = (
    Family("Llama", "llama"),
    Family("Llama 4, short chunks", "llama4_text", CHUNKED),
    Family("Mistral", "mistral", {"sliding_window": None}),
    Family("Mistral, short window", "mistral", SHORT),
    Family("Qwen2", "qwen2"),
    Family("Qwen2, short window", "qwen2", SHORT | QWEN_WINDOW),
    Family("Qwen3", "qwen3"),
    Family("Qwen3, short window", "qwen3", SHORT | QWEN_WINDOW),
    Family("Qwen3-MoE", "qwen3_moe", EXPERTS),
    Family("Qwen3-Next", "qwen3_next", EXPERTS | DELTA_NET),
    Family("Gemma2, short window", "gemma2", SHORT | GEMMA),
    Family("Gemma3, long window", "gemma3_text", LONG | GEMMA | ALTERNATING),
    Family("Gemma3, short window", "gemma3_text", SHORT | GEMMA | ALTERNATING),
    Family("Phi3", "phi3"),
    Family("Phi3, short window", "phi3", SHORT),
    Family("Phi3, longrope", "phi3", LONGROPE),
    Family("PhiMoE", "phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("OLMo3, long window", "olmo3", LONG | ALTERNATING),
    Family("OLMo3, short window", "olmo3", SHORT | ALTERNATING),
    Family("gpt-oss, short window", "gpt_oss", SHORT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("GPT-2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    Family("Mamba2", "mamba2", {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}),
    Family("Nemotron", "nemotron"),
    Family("Doge", "doge"),
    Family("Granite", "granite", {"logits_scaling": 4.0}),
    Family("SmolLM3", "smollm3"),
    Family("GLM4", "glm4"),
    Family("DeepSeek-V3", "deepseek_v3", LATENT),
    Family("Cohere2, short window", "cohere2", SHORT | ALTERNATING),
    Family("Falcon-H1", "falcon_h1", HYBRID),
    Family("ModernBERT decoder", "modernbert-decoder", {"cls_token_id": 1, "sep_token_id": 2}),
)

GROUPS = (
    TokenGroup(list(range(3, 23)), ([30, 31, 32], [33], [30, 34, 35, 36, 37, 38]), (0, 0, 0)),
    TokenGroup([40, 41], ([42, 43], [44, 45, 46]), (1, 0)),  # a first token that is prompt for one candidate alone
    TokenGroup(list(range(90, 50, -4)), ([60, 61], [62, 63, 64, 65], [62, 63, 64, 65], [66]), (0, 0, 0, 0)),
)
"""Ragged groups, one with equal candidates; the longest row is longer than the short windows."""
LONGEST = max(len(group.prefix) + len(branch) for group in GROUPS for branch in group.branches)


class Measurement(NamedTuple):
    """How a family runs and how far it is from separate rows.

    Attributes:
        prompt: ``shared``, ``unshared``, ``refused`` or ``not built``.
        backend: what ``model.attention=auto`` takes; None where refused or not built.
        reason: why.
        nats: largest absolute error of a response's log-prob; not a number without a backend, as the next two.
        log_probs: relative error of all log-probs, |seen - expected| / |expected|.
        gradients: relative error of the worst parameter's gradient; small ones are held to a thousandth of the whole.
    """

    family: str
    prompt: str
    backend: Backend | None
    reason: str
    nats: float = float("nan")
    log_probs: float = float("nan")
    gradients: float = float("nan")

    @property
    def exact(self) -> bool:
        """Whether the errors are rounding and nothing else."""
        return self.log_probs <= LOG_PROB_LIMIT and self.gradients <= GRADIENT_LIMIT


def measure(family: Family, device: torch.device, backend: Backend | None = None) -> Measurement:
    """Route a family as training would on ``device`` and measure it in fp32; ``backend`` overrides the route.

    A family is refused where training refuses it: by its route, its head, the mask its layers add, or the check of
    shared prompts at the start.
    """
    model = _tiny_model(family).to(device)
    try:
        require_deterministic(model.config, family.name)
        route = choose_backend(model, device.type, LONGEST)
        taken = backend or route.backend
        module = LogProbModel(model)
        expected = _by_separate_rows(model)
        expected_gradients = _gradients(model, expected)
        use_backend(model, taken)
        seen = module(lay_out(GROUPS, taken != "unshared").to(device))
        if backend is None and taken != "unshared":
            _require_agreement(seen, expected)
    except UserError as error:
        reason = re.sub(rf"^{re.escape(family.name)}: |^{family.model_type}: ", "", str(error))
        return Measurement(family.name, "refused", None, reason)
    gradients = _gradients(model, seen)
    total = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    return Measurement(
        family.name,
        "unshared" if taken == "unshared" else "shared",
        taken,
        route.reason,
        nats=(seen - expected).abs().max().item(),
        log_probs=((seen - expected).norm() / expected.norm()).item(),
        gradients=max(
            ((gradients[name] - right).norm() / right.norm().clamp(min=1e-3 * total)).item()
            for name, right in expected_gradients.items()
        ),
    )


def _require_agreement(seen: Tensor, expected: Tensor) -> None:
    """As ``training/checks.py`` does, without the figures, which are the machine's."""
    if disagreement([seen.detach().cpu().numpy()], [expected.detach().cpu().numpy()], torch.float32) is not None:
        raise UserError(
            "a shared prompt changes its log-probabilities, as the check at the start finds; set "
            "model.attention=unshared"
        )


def measure_every(device: torch.device) -> Iterator[Measurement]:
    """A measurement of every causal language model of the installed transformers; ``not built`` where it has no tiny
    configuration that runs, which says nothing of the real ones."""
    for model_type, options in tiny_options(SMALL):
        if isinstance(options, str):
            yield Measurement(model_type, "not built", None, options)
            continue
        yield _first_that_runs(model_type, options, device)


def _first_that_runs(model_type: str, options: dict[str, int], device: torch.device) -> Measurement:
    """Sizes that do not go together fail in as many ways as there are types."""
    why = ""
    for variant in VARIANTS:
        try:
            return measure(Family(model_type, model_type, options | variant), device)
        except Exception as error:
            why = why or f"{type(error).__name__}: {first_line(error)[:120]}"
    return Measurement(model_type, "not built", None, why)


def show_architectures(output: Path | None, every: bool = False) -> bool:
    """Measure families, print the table and write it to ``output``; False if any of them is wrong.

    Args:
        output: file to write; None only prints.
        every: all of the installed transformers instead of the chosen ones, which takes minutes.

    Raises:
        UserError: ``output`` cannot be written; found before anything is measured.
    """
    if output is not None and not (os.access(output.parent, os.W_OK) and not output.is_dir()):
        raise UserError(f"--output {output} cannot be written; name a file in a folder that exists and is writable")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure_every(device) if every else (measure(family, device) for family in FAMILIES)
    measurements = list(shown(found, len(model_types()) if every else len(FAMILIES)))
    text = markdown(measurements, device)
    print(text, end="")
    if output is not None:
        write_whole(output, text)
    return all(m.exact or m.prompt in UNMEASURED for m in measurements)


def shown(measurements: Iterable[Measurement], count: int) -> Iterator[Measurement]:
    """The same, each announced on stderr: a family may take a minute."""
    for number, measured in enumerate(measurements, 1):
        print(f"{number}/{count} {measured.family}: {measured.prompt}", file=sys.stderr, flush=True)
        yield measured


def markdown(measurements: Sequence[Measurement], device: torch.device) -> str:
    """The table with what it was measured on."""
    import transformers

    lines = [
        "# Architectures",
        "",
        "Made by `dmpo architectures --output docs/ARCHITECTURES.md`: tiny random models of each family in fp32 on "
        f"{device.type}, transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}.",
        "",
        "*Shared*: a group's prompt runs once, by the attention named. *Unshared*: each candidate runs as its own row, "
        "through the same commands. *Refused*: an error that says why. Errors are against one full, unpadded row for "
        "each response through the model's own logits: the largest of a response's log-probs in nats, and the worst "
        f"parameter's gradient, relative. A test holds them to {LOG_PROB_LIMIT:g} (log-probs, relative) and "
        f"{GRADIENT_LIMIT:g}. A *short* window is shorter than the rows, a *long* one is not.",
        "",
        "| family | prompt | attention | log-probs (nats) | gradients | why |",
        "|---|---|---|---:|---:|---|",
    ]
    for m in measurements:
        errors = [f"{error:.0e}" if error == error else "-" for error in (m.nats, m.gradients)]
        verdict = m.prompt if m.exact or m.prompt in UNMEASURED else f"**{m.prompt}, wrong**"
        lines.append(f"| {m.family} | {verdict} | {m.backend or '-'} | {' | '.join(errors)} | {m.reason} |")
    return "\n".join(lines) + "\n"


def _tiny_model(family: Family) -> Any:
    """A random model whose every weight matters, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.model_type, **SMALL | family.options)
    silence(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def _by_separate_rows(model: Any) -> Tensor:
    """(R,) log-probs of all responses, each from a row of its own and the model's own logits."""
    model.set_attn_implementation(native_attention(model))
    out = []
    for group in GROUPS:
        for branch, start in zip(group.branches, group.scored_from, strict=True):
            row = torch.tensor([group.prefix + branch], device=model.device)
            log_probs = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
            first = len(group.prefix) + start
            out.append(log_probs[torch.arange(first - 1, row.shape[1] - 1), row[0, first:]].sum())
    return torch.stack(out)


def _gradients(model: Any, log_probs: Tensor) -> dict[str, Tensor]:
    """Gradients by parameter of a weighted sum of log-probs, 0 where a parameter has none."""
    model.zero_grad(set_to_none=True)
    (log_probs * torch.linspace(-1, 1, len(log_probs), device=log_probs.device)).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }
