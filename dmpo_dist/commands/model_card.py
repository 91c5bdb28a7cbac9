"""The model card of an exported model: everything its folders say about it, and a list of what they do not say."""

import re

import yaml

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import Evaluation, Interval
from dmpo_dist.data.template import Template
from dmpo_dist.evaluation.metrics import METRICS, sure_hits
from dmpo_dist.records.provenance import Provenance

SHOWN_OBJECTIVE = (
    "import_path", "kwargs", "beta", "sft_weight", "sft_loss_on", "label_smoothing", "reference_free",
    "length_normalize", "negative_selection", "dynamic_beta", "gamma", "margin_weight",
)  # fmt: skip
SHOWN_STAGE = ("global_batch_size", "learning_rate", "schedule", "negatives", "loss_on", "history_order")

SNIPPET = '''\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where these files lie
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()

def log_prob(prompt: str, response: str) -> float:
    """Log-probability of the response after the prompt, summed over its tokens."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    first = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), len(before))
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(first, len(ids)))

prompt = {prompt!r}
responses = {{title: {response} for title in {titles!r}}}
print(sorted(responses, key=lambda title: log_prob(prompt, responses[title]), reverse=True))'''


def model_card(
    name: str,
    kind: str,
    origin: Provenance,
    template: Template,
    difference: str,
    evaluation: tuple[str, Evaluation] | None,
) -> str:
    """The README.md of an exported model, with the YAML header that the Hugging Face hub reads.

    Args:
        kind: what the folder holds, such as "PEFT adapter (LoRA), float32".
        difference: a sentence on how far its scores are from the trained model's.
        evaluation: the model's name in an ``evaluation.json``, and the content of that file.
    """
    is_adapter = kind.startswith("PEFT")
    sections = {
        "Use": _use(template),
        "Training": _training(origin),
        "Data": _data(origin),
        "Metrics": _metrics(evaluation),
        "Export": [f"{kind}. {difference}"],
        "Licences": _licences(origin),
        "Intended use and limits": [
            "To order items that a user may like next, among candidates that are given to it, from titles the user "
            "liked before, in the template of `dmpo.json`; other prompts, lists of items it was not trained on and "
            "other languages were not measured.",
            "It learned from logged choices, so it can carry on their popularity bias and whatever else they hold of "
            "their users. It was not examined for safety as a chat model and is none. A log-probability is a score for "
            "ranking, not the chance that a user likes an item.",
        ],
        "Not known": [
            "\n".join(f"- {gap}" for gap in _gaps(origin, evaluation)) or "Nothing that this card should say."
        ],
    }
    lines = ["---", _header(origin, is_adapter, evaluation).rstrip(), "---", "", f"# {name}", ""]
    lines += [
        f"A language model fine-tuned as a ranker of items with dmpo_dist {origin.stamp.dmpo_dist or ''}.",
        "",
    ]
    for title, paragraphs in sections.items():
        lines += [f"## {title}", ""]
        for paragraph in paragraphs:
            lines += [paragraph, ""]
    return "\n".join(lines).rstrip() + "\n"


def _header(origin: Provenance, is_adapter: bool, evaluation: tuple[str, Evaluation] | None) -> str:
    tags = ["dmpo", "recommender-systems", "ranking"]
    if _stage(origin) == "train":
        tags += ["preference-optimization", (origin.config.get("objective") or {}).get("name")]
    tags += ["lora"] if is_adapter else []
    header = {
        "base_model": origin.base,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": origin.base_license,
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
        "datasets": [re.sub(r"[^\w.]+", "-", origin.dataset.name.lower()).strip("-")] if origin.dataset else None,
        "metrics": list(evaluation[1].models[evaluation[0]]) if evaluation else None,
    }  # fmt: skip
    return yaml.safe_dump({key: value for key, value in header.items() if value}, sort_keys=False, allow_unicode=True)


def _use(template: Template) -> list[str]:
    before, after = template.response.split("{title}", 1)
    parts = [repr(before) if before else "", "title", repr(after + template.terminator)]
    response = " + ".join(part for part in parts if part)
    prompt = template.render(("First title", "Second title")).text
    code = SNIPPET.format(prompt=prompt, response=response, titles=["Title A", "Title B"])
    return [f"```python\n{code}\n```"]


def _training(origin: Provenance) -> list[str]:
    lines = [f"Stages: {' -> '.join(origin.stages)}." if origin.stages else "Stages: not written down."]
    stage = _stage(origin)
    section = origin.config.get("sft" if stage == "sft" else "train") or {}
    objective = origin.config.get("objective") or {} if stage == "train" else {}
    if objective:
        shown = ", ".join(f"{key} {objective[key]}" for key in SHOWN_OBJECTIVE if key in objective)
        lines.append(f"Objective: `{objective.get('name')}` ({shown}); see the docstrings of dmpo_dist/objectives.")
    elif stage == "sft":
        scored = "all titles, those of the history too" if section.get("loss_on") == "all_titles" else "the response"
        lines.append(f"Objective: likelihood of {scored}.")
    if section:
        length = "epochs" if section.get("steps") is None else "steps"
        shown = [f"{key} {section[key]}" for key in (length, *SHOWN_STAGE) if section.get(key) is not None]
        lines.append(f"Settings: {', '.join(shown)}; seed {origin.config.get('seed')}.")
    validated = origin.stamp.validation()
    if validated:
        shown = ", ".join(f"{key} {validated[key]:.4f}" for key in METRICS if key in validated)
        lines.append(f"Weights of step {origin.stamp.step}; on validation requests: {shown}.")
    environment = origin.environment or Environment()
    packages = environment.packages
    versions = [
        f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "deepspeed") if packages.get(name)
    ]
    if versions:
        lines.append(f"Made with {', '.join(versions)}; commit {environment.git_commit or 'not known'}.")
    return lines


def _data(origin: Provenance) -> list[str]:
    card = origin.dataset
    if not card:
        return ["Not written down beside the model."]
    counts = ", ".join(f"{number} {split}" for split, number in card.counts.items())
    lines = [f"{card.name}: {counts} requests; fingerprint `{card.fingerprint}`."]
    if card.cuts:
        lines.append(
            f"Split by time: validation from {card.cuts['validation'].utc}, test from {card.cuts['test'].utc}."
        )
    if origin.same_data is False:
        lines.append("**This is not the data the model was trained on**: the fingerprints differ.")
    notes = "\n".join(f"- {note}" for note in card.notes)
    return [*lines, notes] if notes else lines


def _metrics(evaluation: tuple[str, Evaluation] | None) -> list[str]:
    if evaluation is None:
        return ["None given at export."]
    own, content = evaluation
    fewest, most = min(content.negatives.values()), max(content.negatives.values())
    metrics = [metric for metric in content.models[own] if metric not in sure_hits(most)]
    setting = (
        f"{content.requests} test requests, one positive among {fewest if fewest == most else f'{fewest} to {most}'} "
        "negatives, 95 % bootstrap intervals; measured on the model as trained, before export."
    )
    if any(figure.low is None for figure in content.models[own].values()):
        setting += f" It is one seed of several ({own}), whose figures have no intervals of their own."
    table = ["| model | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for name, values in content.models.items():
        cells = [_cell(values.get(metric)) for metric in metrics]
        seeds = len(content.seeds.get(name, {}))
        label = "**this model**" if name == own else f"{name}, mean over {seeds} seeds" if seeds else name
        table.append(f"| {label} | {' | '.join(cells)} |")
    return [setting, "\n".join(table)]


def _cell(figure: Interval | None) -> str:
    """Mean and interval; one seed of several has no interval of its own."""
    if figure is None:
        return "-"
    spread = "" if figure.low is None or figure.high is None else f" ({figure.low:.3f}-{figure.high:.3f})"
    return f"{figure.value:.3f}{spread}"


def _licences(origin: Provenance) -> list[str]:
    if origin.scratch:
        base = "It began with random weights, so no base model's licence applies."
    elif origin.base_license:
        base = f"The base model's card says `{origin.base_license}`."
    else:
        base = "The base model's licence is not known; look at its own card."
    return [
        base + " The data's terms stand with the data above where they are known. dmpo_dist, which trained it, is "
        "Apache-2.0; that says nothing of the weights."
    ]


def _gaps(origin: Provenance, evaluation: tuple[str, Evaluation] | None) -> list[str]:
    """What a reader expects on a model card and this one cannot say."""
    gaps = {
        "The base model: it started from a folder that names none.": origin.base is None and not origin.scratch,
        "A licence: none was given for these weights.": origin.base_license is None,
        "The settings of the run: no config.yaml lay beside the model.": not origin.config,
        "The versions and seed: no environment.json lay beside the model.": not origin.environment,
        "The data: no dataset.json was found.": not origin.dataset,
        "Whether that is the data it was trained on.": bool(origin.dataset) and origin.same_data is None,
        "Test metrics: no evaluation.json was given.": evaluation is None,
    }
    return [gap for gap, missing in gaps.items() if missing]


def _stage(origin: Provenance) -> str:
    return origin.stamp.stage or ""
