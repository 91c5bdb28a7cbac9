"""Oracle of all attention and log-prob tests: one full, unpadded row per response through the model's own logits."""

import torch

from dmpo_dist.batching.layout import prefix_layout, rows_layout
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import native_attention, use_backend


def oracle(model, groups):
    """Log-probs of every response, each by its own unpadded row and a log-softmax over all logits."""
    unwrap_peft(model).set_attn_implementation(native_attention(unwrap_peft(model)))
    out = []
    for group in groups:
        for branch, start in zip(group.branches, group.scored_from, strict=True):
            row = torch.tensor([group.prefix + list(branch)], device=model.device)
            log_probs = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
            first = len(group.prefix) + start
            out.append(log_probs[torch.arange(first - 1, row.shape[1] - 1), row[0, first:]].sum())
    return torch.stack(out)


def fused(model, groups, backend):
    """Log-probs by ``backend`` on the model's device."""
    use_backend(unwrap_peft(model), backend)
    layout = rows_layout(groups) if backend == "unshared" else prefix_layout(groups)
    return LogProbModel(model)(layout.to(model.device))


def gradients(model, log_probs):
    """Gradients by parameter of a weighted sum of log-probs."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, len(log_probs), dtype=log_probs.dtype, device=log_probs.device)
    (log_probs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(seen, expected):
    """|seen - expected| / |expected| as a number, in fp64 on the CPU."""
    seen, expected = seen.detach().cpu().double(), expected.detach().cpu().double()
    return ((seen - expected).norm() / expected.norm()).item()


def gradient_errors(seen, expected):
    """Relative error of each parameter's gradient; a tiny gradient is held to a thousandth of the whole."""
    assert seen.keys() == expected.keys()
    expected = {name: g.cpu().double() for name, g in expected.items()}
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    return {
        name: ((seen[name].cpu().double() - g).norm() / max(g.norm(), 1e-3 * total)).item()
        for name, g in expected.items()
    }


def assert_equal_to_oracle(model, groups, backend, log_prob_error, gradient_error):
    """Log-probs and every parameter's gradient lie within these relative errors."""
    expected = oracle(model, groups)
    expected_gradients = gradients(model, expected)
    seen = fused(model, groups, backend)
    assert relative_error(seen, expected) < log_prob_error
    for name, error in gradient_errors(gradients(model, seen), expected_gradients).items():
        assert error < gradient_error, name
