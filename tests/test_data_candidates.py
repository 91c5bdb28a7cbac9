"""Prompts that list the candidates: the order drawn, the ids, what is listed in which step, and what is refused."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import chisquare
from test_data_tokenization import TOKENIZERS, pieces

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.config import RunConfig, TemplateConfig
from dmpo_dist.data.candidates import balance_line, list_order, lists_as_stored, place_of
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import groups_from_rows
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer
from dmpo_dist.errors import UserError
from dmpo_dist.training.groups import Batches, candidate_columns
from dmpo_dist.training.job import Job
from dmpo_dist.training.listed import ListedGroups, require_lists

LISTING = TemplateConfig(request="Choose from:\n{candidates}The title this user will like next:\n")
TITLES = ("Heat", "Alien", "The Thing", "The Fly", "Up", "Tron", "...And Justice for All (1979)", "Amélie")


def group(*candidates, history=(), user="u1", timestamp=7, prompt=None):
    return PreferenceGroup(user, timestamp, tuple(history), candidates[0], tuple(candidates[1:]), prompt)


def test_the_order_is_a_function_of_seed_request_and_draw_alone():
    first = list_order(TITLES, 0, "u1", 7, 0)
    assert sorted(first) == sorted(TITLES)
    assert list_order(reversed(TITLES), 0, "u1", 7, 0) == first
    others = [(1, "u1", 7, 0), (0, "u2", 7, 0), (0, "u1", 8, 0), (0, "u1", 7, 1)]
    assert len({first, *(list_order(TITLES, *other) for other in others)}) == 5


def test_the_positive_stands_anywhere_alike():
    places = [place_of(group(*TITLES[:5], user=f"u{n}"), TITLES[:5], 3, 0) for n in range(4000)]
    counts = np.bincount([place for place, _ in places])
    assert len(counts) == 5
    assert chisquare(counts).pvalue > 1e-3
    line = balance_line([(0, 4), (3, 4), (1, 2), (0, 2)])
    assert "in 4 lists" in line
    assert "first in 50.0% and last in 50.0% (37.5% by chance), on average 0.500" in line


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "config",
    [LISTING, TemplateConfig(preamble="", candidate='"{title}", ', request="{candidates}Next: ", response='"{title}"'),
     TemplateConfig(candidate="{title}, ", request="One of {candidates}")],
)  # fmt: skip
@pytest.mark.parametrize("history", [(), ("Heat", "Solaris")])
def test_ids_are_those_of_the_whole_text_but_for_the_boundary_and_response_and_end_are_scored(name, config, history):
    tokenizer = TOKENIZERS[name]
    case = group(*TITLES, history=history)
    tokens = GroupTokenizer(tokenizer, make_template(config, tokenizer), 10_000, seed=5)(case, 2)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    listed = "".join(config.candidate.replace("{title}", t) for t in list_order(TITLES, 5, "u1", 7, 2))
    items = "".join(config.item.replace("{title}", title) for title in history)
    prompt = (tokenizer.bos_token or "") + config.preamble + items + config.request.replace("{candidates}", listed)
    wholes = [ids(prompt + config.response.replace("{title}", title) + tokenizer.eos_token) for title in TITLES]
    alone = ids(prompt.rstrip(" "))
    assert (tokens.prefix, set(tokens.scored_from)) == (alone, {0})
    for whole, branch in zip(wholes, tokens.branches, strict=True):
        assert pieces(tokenizer, alone + branch) == pieces(tokenizer, whole)
        assert whole[: len(alone)] != alone or whole == alone + branch


def test_other_templates_and_their_stamps_are_as_they_were():
    old = {key: value for key, value in TemplateConfig().model_dump().items() if key != "candidate"}
    assert TemplateConfig.model_validate(old) == TemplateConfig()
    tokenizer = TOKENIZERS["byte level"]
    plain = [GroupTokenizer(tokenizer, make_template(TemplateConfig(), tokenizer), 999, seed=seed) for seed in (0, 9)]
    case = group(*TITLES, history=("Solaris",))
    assert plain[0](case) == plain[1](case, 4, TITLES[:2])


def test_the_history_goes_first_then_the_list_is_refused_with_numbers():
    tokenizer = TOKENIZERS["byte level"]
    template = make_template(LISTING, tokenizer)
    roomy = GroupTokenizer(tokenizer, template, 999)

    def longest(tokens):
        return len(tokens.prefix) + max(map(len, tokens.branches))

    short, case = group(*TITLES, history=("Tron",)), group(*TITLES, history=("Solaris",) * 9 + ("Tron",))
    tight = GroupTokenizer(tokenizer, template, longest(roomy(short)))
    assert tight(case) == roomy(short)
    assert tight.dropped_titles == 9
    needed = longest(roomy(group(*TITLES)))
    assert GroupTokenizer(tokenizer, template, needed)(case) == roomy(group(*TITLES))
    with pytest.raises(
        UserError, match=rf"lists 8 candidates, and .* take {needed} tokens, more than .*={needed - 1};"
    ):
        GroupTokenizer(tokenizer, template, needed - 1)(case)
    with pytest.raises(UserError, match="user 'u1' holds finished prompts, to which no list can be added"):
        roomy(group(*TITLES, prompt="Choose."))


@pytest.mark.parametrize(
    "options", [{"preamble": "{candidates}"}, {"request": "{candidates}{candidates}"}, {"candidate": "- x\n"}]
)
def test_placeholders_that_mean_nothing(options):
    with pytest.raises(ValueError, match=r"\{candidates\}|\{title\}"):
        TemplateConfig(**options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    source = {"simulator": {"users": 40, "items": 40, "events_per_user": 12}}
    config = RunConfig.model_validate({"data": {"source": source, "negatives_per_group": 5, "evaluation_negatives": 5}})
    return prepare(config.data, 0, tmp_path_factory.mktemp("listed") / "data", echo=lambda _: None)


def lists_of(tokenizer, tokens):
    """The titles that a prompt lists, in order."""
    text = tokenizer.decode(tokens.prefix).split("Choose from:\n")[1]
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]


@pytest.mark.parametrize("sft", [False, True])
def test_each_step_lists_its_own_candidates_on_every_rank(data, sft):
    tokenizer, rows, k = TOKENIZERS["byte level"], groups_from_rows(data.train), 3
    encode = GroupTokenizer(tokenizer, make_template(LISTING, tokenizer), 999)
    listed = ListedGroups(rows, encode, k, responses=not sft, as_stored=False)
    batches = Batches([], Schedule(len(rows), 8, 0), 0 if sft else k, 2, 4096, True, listed)
    orders = set()
    for index in range(3 * batches.schedule.steps_per_epoch):
        step = batches.step(index)
        seen = [g for rank in step.micro_batches for m in rank if not m.filler for g in m.groups]
        assert sorted(seen) == sorted(step.groups)
        for g in seen:
            tokens = batches.group(g, step.epoch)
            columns = candidate_columns(5, k, step.epoch * k)
            expected = [(rows[g].positive, *rows[g].negatives)[column] for column in columns]
            assert sorted(lists_of(tokenizer, tokens)) == sorted(expected)
            responses = [tokenizer.decode(b[s:]) for b, s in zip(tokens.branches, tokens.scored_from, strict=True)]
            assert responses == [f"{title}</s>" for title in (expected[:1] if sft else expected)]
            orders.add((step.epoch, tuple(lists_of(tokenizer, tokens)).index(rows[g].positive)))
    assert {place for _, place in orders} == {0, 1, 2, 3}
    assert f"in {3 * len(rows)} lists of candidates" in listed.balance(3)


def test_s_dpo_rows_list_their_item_list_in_every_step(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"history": ["A", "B"], "itemList": ["C", "D", "E", "F", "G"], "trueSelection": "E"}\n')
    config = RunConfig.model_validate({"data": {"source": {"kind": "sdpo", "path": str(file)}}})
    made = prepare(config.data, 0, tmp_path / "data", echo=lambda _: None)
    assert lists_as_stored(made)
    tokenizer = TOKENIZERS["byte level"]
    encode = GroupTokenizer(tokenizer, make_template(LISTING, tokenizer), 999)
    listed = ListedGroups(groups_from_rows(made.train), encode, 2, responses=True, as_stored=True)
    assert [sorted(lists_of(tokenizer, listed(0, epoch))) for epoch in range(3)] == [list("CDEFG")] * 3
    assert [len(listed(0, epoch).branches) for epoch in range(3)] == [3, 3, 3]


def test_what_does_not_go_with_lists(data):
    def job(kind="preference", **sections):
        config = RunConfig.model_validate({"template": LISTING.model_dump()} | sections)
        return Job(kind, config, "start", data.path)

    require_lists(job(), data)
    require_lists(job("sft", sft={"negatives": 5}), data)
    with pytest.raises(UserError, match="sft.negatives=6, but the prepared data holds 5"):
        require_lists(job("sft", sft={"negatives": 6}), data)
    with pytest.raises(UserError, match="set sft.history_order=given"):
        require_lists(job("sft", sft={"history_order": "shuffled"}), data)
    with pytest.raises(UserError, match="reference.cache=memory .* set reference.cache=off"):
        require_lists(job(reference={"cache": "memory"}), data)
    finished = data.train.map(lambda row: row | {"prompt": "Choose.", "history": []})
    with pytest.raises(UserError, match="holds finished prompts"):
        require_lists(job(), dataclasses.replace(data, train=finished))
