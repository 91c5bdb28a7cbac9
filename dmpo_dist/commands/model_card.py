"""The model card of an exported model: everything its folders say about it, and a list of what they do not say."""

import re

from huggingface_hub import EvalResult, ModelCardData

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import Evaluation, Interval
from dmpo_dist.config.model import PLACEHOLDER
from dmpo_dist.data.template import Template
from dmpo_dist.evaluation.comparisons import comparison_lines
from dmpo_dist.evaluation.metrics import METRICS, sure_hits
from dmpo_dist.evaluation.tables import metrics_table
from dmpo_dist.formats import metric_name
from dmpo_dist.records.provenance import Provenance
from dmpo_dist.tables import markdown
from dmpo_dist.verdicts import rule

SHOWN_OBJECTIVE = (
    "import_path", "kwargs", "beta", "sft_weight", "sft_loss_on", "label_smoothing", "reference_free",
    "length_normalize", "negative_selection", "dynamic_beta", "gamma", "margin_weight",
)  # fmt: skip
SHOWN_STAGE = ("global_batch_size", "learning_rate", "schedule", "negatives", "loss_on", "history_order")

TITLE = "a title"
CARD_METRICS = ("ndcg@10", "hr@1", "hr@5", "hr@10", "mrr", "auc")
"""What fits beside each other; evaluation.json has all."""

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
    lines = ["---", _header(name, origin, is_adapter, evaluation).rstrip(), "---", "", f"# {name}", ""]
    lines += [
        f"A language model fine-tuned as a ranker of items with dmpo_dist {origin.stamp.dmpo_dist or ''}.",
        "",
    ]
    for title, paragraphs in sections.items():
        lines += [f"## {title}", ""]
        for paragraph in paragraphs:
            lines += [paragraph, ""]
    return "\n".join(lines).rstrip() + "\n"


def _header(name: str, origin: Provenance, is_adapter: bool, evaluation: tuple[str, Evaluation] | None) -> str:
    tags = ["dmpo", "recommender-systems", "ranking"]
    if _stage(origin) == "train":
        tags += ["preference-optimization", (origin.config.get("objective") or {}).get("name")]
    tags += ["lora"] if is_adapter else []
    data = origin.dataset.name if origin.dataset else "its test requests"
    dataset = re.sub(r"[^\w.]+", "-", data.lower()).strip("-")
    measured = {} if evaluation is None else _shown(*evaluation)
    header = ModelCardData(
        base_model=origin.base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=origin.base_license,
        tags=list(dict.fromkeys(tag for tag in tags if tag)),
        datasets=[dataset] if origin.dataset else None,
        metrics=list(measured) or None,
        model_name=name,
        eval_results=[
            EvalResult("text-ranking", dataset, data, metric, figure.value, metric_name=metric_name(metric))
            for metric, figure in measured.items()
        ]
        or None,
    )
    return header.to_yaml()


def _use(template: Template) -> list[str]:
    before, after = template.render_response(TITLE).split(TITLE, 1)
    response = " + ".join(part for part in (repr(before) if before else "", "title", repr(after)) if part)
    titles, history = ["Title A", "Title B"], ("First title", "Second title")
    parts = (template.preamble, template.item, template.request, template.candidate or "")
    names = [name for name in PLACEHOLDER.findall("".join(parts)) if name not in ("title", "candidates")]
    fields = {name: name.upper() for name in names}
    listed = titles if template.lists_candidates else ()
    prompt = template.render(history, listed, dict.fromkeys((*history, *titles), fields), fields).text
    code = f"```python\n{SNIPPET.format(prompt=prompt, response=response, titles=titles)}\n```"
    if not fields:
        return [code]
    return [code, f"In the prompt put each item's or user's own text for {', '.join(dict.fromkeys(fields.values()))}."]


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
        template = origin.stamp.template
        without = {"negatives"} if stage == "sft" and not (template and template.lists_candidates) else set()
        keys = [key for key in (length, *SHOWN_STAGE) if key not in without and section.get(key) is not None]
        shown = [f"{key} {section[key]}" for key in keys]
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


def _shown(own: str, content: Evaluation) -> dict[str, Interval]:
    """Metric -> the model's figure, of the few metrics that tell models apart."""
    sure = sure_hits(max(content.negatives.values()))
    return {m: content.models[own][m] for m in CARD_METRICS if m in content.models[own] and m not in sure}


def _metrics(evaluation: tuple[str, Evaluation] | None) -> list[str]:
    if evaluation is None:
        return ["None given at export."]
    own, content = evaluation
    fewest, most = min(content.negatives.values()), max(content.negatives.values())
    setting = (
        f"{content.requests} test requests, one positive among {fewest if fewest == most else f'{fewest} to {most}'} "
        "negatives, 95 % bootstrap intervals, the best of a column in bold; measured on the model as trained, before "
        "export."
    )
    if any(figure.low is None for figure in content.models[own].values()):
        setting += f" It is one seed of several ({own}), whose figures have no intervals of their own."
    chosen = content.rules.chosen.get(own) if content.rules else None
    if chosen is not None and chosen.rule != "sum":
        weight = f" with the weight {chosen.prior_weight:g}" if chosen.rule == "prior" else ""
        setting += f" Ranked by the scoring rule {chosen.rule}{weight}, not by the sum that the code above computes."
    labels = {name: "this model" if name == own else name for name in content.models}
    figures = {
        labels[name]: {metric: figure.model_dump() for metric, figure in metrics.items()}
        for name, metrics in content.models.items()
    }
    seeds = {labels[name]: of_model for name, of_model in content.seeds.items() if name in labels}
    metrics = list(_shown(own, content))
    table = metrics_table("", figures, metrics, seeds, heading=metric_name)
    return [setting, markdown(table), *_differences(own, content)]


def _differences(own: str, content: Evaluation) -> list[str]:
    """The paired differences of the model from the others, in the first of ``CARD_METRICS``; nothing without any."""
    whole = content.content()
    lines = [
        f"- {line}"
        for c, line in zip(content.comparisons, comparison_lines(whole), strict=True)
        if c.a == own and c.metric == CARD_METRICS[0]
    ]
    return ["\n".join(lines), rule(len(content.comparisons))] if lines else []


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
