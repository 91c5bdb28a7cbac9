"""Token ids of usual tokenizers and templates are what they were before responses were held to their boundary."""

import json
from pathlib import Path

from test_data_template import CHATML
from test_data_tokenization import byte_level, group, wrap
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer

from dmpo_dist.config import ScratchModel, TemplateConfig
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer
from dmpo_dist.modeling.backbone import make_scratch_model

SAVED = json.loads((Path(__file__).parent / "token_groups.json").read_text())
TITLES = [
    "Heat (1995)", "The Matrix (1999)", "...And Justice for All (1979)", "What's Up, Doc? (1972)", "Amélie (2001)",
    "東京物語 (1953)", "'burbs, The (1989)", "(500) Days of Summer (2009)", "¡Three Amigos! (1986)",
    "*batteries not included",
    "12 Monkeys (1995)", "$9.99 (2008)", "A", "M*A*S*H (1970)",
]  # fmt: skip
GROUPS = [
    group(TITLES[start : start + kept], *TITLES[start + kept :], *TITLES[:start])
    for start, kept in ((0, 1), (2, 3), (5, 6), (9, 0))
]
TEMPLATES = {
    "default": TemplateConfig(),
    "all titles": TemplateConfig(preamble="", item="{title}{end}", request=""),
    "quoted": TemplateConfig(request='Next, as in "title":\n', response="{title} ", terminator="\n"),
    "listing": TemplateConfig(request="One of:\n{candidates}Answer:\n"),
}


def scratch(folder):
    """The quickstart's kind: learned from the catalogue by ``make_scratch_model``."""
    shape = ScratchModel(hidden_size=16, layers=1, heads=2, intermediate_size=24, vocab_size=400)
    make_scratch_model(folder, shape, [*TITLES, *["A user liked these titles, oldest first:\n", "- \n"] * 8], 512, 0)
    return AutoTokenizer.from_pretrained(folder)


def llama():
    """Llama's kind, whose line breaks are bytes that merge with nothing."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*TITLES, "A user liked these titles, oldest first:", "- "] * 3, trainer)
    return wrap(backend, unk_token="<unk>")


def chat():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


def ids(tokenizer, config):
    """[prefix, branches, scored_from, prefix_scored] of each group."""
    ends = "{title}{end}" in config.item
    encode = GroupTokenizer(tokenizer, make_template(config, tokenizer), 10_000, score_history=ends)
    made = [encode(of) for of in GROUPS]
    return [[t.prefix, list(t.branches), list(t.scored_from), list(t.prefix_scored)] for t in made]


def test_token_groups_are_those_of_earlier_versions(tmp_path):
    tokenizers = {"scratch": scratch(tmp_path), "byte level": byte_level(), "llama": llama(), "chat": chat()}
    made = {f"{name}, {kind}": ids(t, c) for name, t in tokenizers.items() for kind, c in TEMPLATES.items()}
    assert made.keys() == SAVED.keys()
    for name, groups in made.items():
        assert groups == SAVED[name], name
