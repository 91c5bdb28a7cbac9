"""Levels of training groups: from ratings, from repeated purchases and from users' rows, to the batch that trains."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import random_groups, word_tokenizer
from worlds import prepared

from dmpo_dist.batching.layout import prefix_layout, rows_layout
from dmpo_dist.commands.hard_negatives import mine_hard_negatives
from dmpo_dist.commands.train import require_reorderable
from dmpo_dist.config import DataConfig, RunConfig, Source, TemplateConfig
from dmpo_dist.data.folder import check
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.sources.preferences import PreferenceRow, load_preferences
from dmpo_dist.data.store import LEVEL_FEATURES, ROW_FEATURES, PreparedData, groups_from_rows
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.registry import OBJECTIVES
from dmpo_dist.training.groups import groups_of, require_levels, require_negatives, with_negatives
from dmpo_dist.training.listed import ListedGroups

LIKES, DECAY, UNSEEN = 3, 0.5, 2.0


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """30 customers of a shop of 40 things, each of whom buys what they bought before every other time."""
    rng = np.random.default_rng(0)
    lines = ["user,item,rating,timestamp,title"]
    for user in range(30):
        own = rng.permutation(40)[:8]
        for number, time in enumerate(np.sort(rng.choice(10_000, 16, replace=False))):
            item = own[rng.integers(1 + number // 2)] if number % 2 else own[number // 2]
            lines.append(f"u{user:02},i{item:02},{rng.integers(2, 6)},{time},Thing {item:02}")
    file = tmp_path_factory.mktemp("shop") / "log.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def settings(log: Path, **changes) -> DataConfig:
    given = {
        "source": {"path": str(log)}, "repeats": "keep", "rating_threshold": 3, "negatives_per_group": 4,
        "evaluation_negatives": 4, "level_likes": LIKES, "score_decay": DECAY, "unseen_score": UNSEEN,
    }  # fmt: skip
    return DataConfig.model_validate(given | changes)


@pytest.fixture(scope="module")
def made(log, tmp_path_factory) -> dict[str, PreparedData]:
    folder = tmp_path_factory.mktemp("levels")
    return {
        f"{levels}, {split}": prepare(
            settings(log, levels=levels, split=split), 0, folder / f"{levels}-{split}", lambda _: None, allow_leaks=True
        )
        for levels in ("ratings", "repeats")
        for split in ("time", "leave_one_out")
    }


@pytest.mark.parametrize("name", ["ratings, time", "ratings, leave_one_out", "repeats, time", "repeats, leave_one_out"])
def test_levels_are_what_a_loop_over_the_log_says(made, name):
    data, by = made[name], name.split(",")[0]
    events = sorted(data.interactions.itertuples(index=False), key=lambda e: (e.timestamp, e.user, e.item))
    first_seen = {event.item: event.timestamp for event in reversed(events)}
    likes = {user: [e for e in events if e.user == user and e.rating >= 3] for user in data.interactions["user"]}
    if data.card.cuts:
        likes = {u: [e for e in of if e.timestamp < data.card.cuts["validation"].timestamp] for u, of in likes.items()}
    else:
        likes = {user: of[:-2] for user, of in likes.items()}
    for row in data.train.to_list():
        after = [e for e in likes[row["user"]] if e.timestamp >= row["timestamp"]]
        value = Counter(e.item for e in after) if by == "repeats" else {e.item: e.rating for e in reversed(after)}
        found = [i for i in dict.fromkeys(e.item for e in after) if first_seen[i] < row["timestamp"]][:LIKES]
        assert found[0] == after[0].item, "the request's own like is among them"
        order = sorted(found, key=lambda item: (-value[item], found.index(item)))
        values = sorted({value[item] for item in found}, reverse=True)
        candidates = [row["positive_item"], *row["negative_items"]]
        assert candidates[: len(order)] == order
        assert len(candidates) == len(set(candidates)) == len(order) + 4
        levels = [values.index(value[item]) for item in order] + [len(values)] * 4
        assert row["levels"] == (levels if len(order) > 1 else [])
        scores = [value[item] / (1 + found.index(item)) ** DECAY for item in order] + [
            UNSEEN / (1 + LIKES) ** DECAY
        ] * 4
        assert row["scores"] == pytest.approx(scores)
        assert not {*row["negative_items"][len(order) - 1 :]} & {e.item for e in after[: len(found)]}
    assert max(max(levels, default=0) for levels in data.train["levels"][:]) >= 2
    assert data.test.features == data.validation.features == ROW_FEATURES, "one positive is ranked there"
    assert f"data.levels={by}: {sum(data.lists())} of {len(data.train)} training groups" in " ".join(data.card.notes)


def test_leveled_data_is_read_back_and_checked_and_other_data_stays_what_it_is(made, log, tmp_path):
    data = made["ratings, time"]
    assert PreparedData.load(data.path).train.to_list() == data.train.to_list()
    assert data.few(5).lists().count(True) <= 5
    check(made["repeats, time"].path, lambda _: None)
    plain = prepare(
        settings(log, level_likes=5, unseen_score=3.0), 0, tmp_path / "plain", lambda _: None, allow_leaks=True
    )
    assert plain.train.features == ROW_FEATURES
    assert set(data.train.features) == {*ROW_FEATURES, *LEVEL_FEATURES}
    assert plain.lists() == []
    asked = ["user", "timestamp", "history"]
    assert plain.train.select_columns(asked).to_list() == data.train.select_columns(asked).to_list()
    assert plain.test.to_list() == data.test.to_list()
    assert plain.fingerprint != data.fingerprint


def test_every_epoch_keeps_the_likes_and_goes_on_in_the_negatives():
    (group,) = random_groups(1, seed=1, k=1)
    group = replace(group, branches=tuple([n] for n in range(3, 11)), scored_from=(0,) * 8)
    leveled = replace(group, levels=(0, 0, 1, 2, 2, 2, 2, 2), scores=tuple(8.0 - n for n in range(8)))
    seen = []
    for epoch in range(4):
        taken = with_negatives(leveled, 2, epoch * 2)
        ids = [branch[0] for branch in taken.branches]
        assert ids[:3] == [3, 4, 5]
        assert taken.levels == (0, 0, 1, 2, 2)
        assert taken.scores == tuple(11.0 - n for n in ids)
        seen += ids[3:]
    assert seen == [6, 7, 8, 9, 10, 6, 7, 8]
    assert with_negatives(leveled, 99, 0) == leveled
    (alone,) = (with_negatives(replace(group, levels=()), 2, 2).branches,)
    assert [branch[0] for branch in alone] == [3, 6, 7], "without levels the first is the positive"


def test_sft_takes_one_response_of_a_group_with_levels(made):
    rows = made["ratings, time"].train
    encode = GroupTokenizer(word_tokenizer(), make_template(TemplateConfig(), word_tokenizer()), 256)
    for whole, alone in zip(tokenize_rows(rows, encode), tokenize_rows(rows, encode, negatives=0), strict=True):
        of_step = with_negatives(alone, 0, 0)  # as a step of SFT takes it
        assert of_step.branches == whole.branches[:1]
        assert prefix_layout([of_step]).targets.group_id.tolist() == [0]


def test_both_layouts_hand_the_levels_of_packed_groups_to_the_loss():
    groups = random_groups(5, seed=3, k=4)
    leveled = [
        replace(g, levels=(0, 0, *[1] * (len(g.branches) - 2)), scores=tuple(1.0 + n for n in range(len(g.branches))))
        if len(g.branches) > 2
        else g
        for g in groups
    ]
    assert {bool(group.levels) for group in leveled} == {True, False}
    expected = [level for g in leveled for level in g.levels or (0, *[1] * (len(g.branches) - 1))]
    for layout in (prefix_layout, rows_layout):
        found = groups_of(layout(leveled).targets)
        assert found.level.tolist() == expected
        assert found.n_levels == 2
        assert found.is_positive.sum() == found.count
        assert found.scores is None, "a group without them"
        plain = groups_of(layout(groups).targets)
        assert (plain.level, plain.scores) == (None, None)
        scored = groups_of(layout([g for g in leveled if g.scores]).targets)
        assert scored.scores.tolist() == [score for g in leveled for score in g.scores]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RANKED = {"prompt": "Next?", "ranked": [["w1"], ["w2", "w3"], ["w4", "w5", "w6"]], "scores": [[5], [4, 4.5], [1, 2, 3]]}


def test_users_rows_with_levels(tmp_path):
    message = {"role": "assistant", "content": "w2"}
    rows = [
        RANKED,
        {"prompt": "Next?", "ranked": [["w1"], ["w2", "w3"]]},  # one positive: as chosen and rejected
        {"prompt": "Next?", "chosen": "w1", "rejected": ["w3", "w4"]},  # merges with the row before
        {"prompt": [{"role": "user", "content": "And?"}], "ranked": [["w1", [message]], ["w3"]]},
    ]
    found = load_preferences(write(tmp_path / "rows.jsonl", rows), seed=0)
    assert found.splits["train"] == [
        PreferenceRow(
            "Next?", "w1", ("w2", "w3", "w4", "w5", "w6"), levels=(0, 1, 1, 2, 2, 2), scores=(5, 4, 4.5, 1, 2, 3)
        ),
        PreferenceRow("Next?", "w1", ("w2", "w3", "w4")),
        PreferenceRow("And?", "w1", ("w2", "w3"), levels=(0, 0, 1)),
    ]
    assert "2 of 3 training groups have several positives or more than two levels." in found.notes
    assert not any("both ways" in note for note in found.notes)


def test_what_is_held_out_ranks_one_positive(tmp_path):
    rows = [{"prompt": f"p{n}", "ranked": [["a", "b"], ["c"], ["d", "e"]]} for n in range(60)]
    found = load_preferences(write(tmp_path / "rows.jsonl", rows), seed=0)
    assert {group.levels for group in found.splits["train"]} == {(0, 0, 1, 2, 2)}
    assert {(g.chosen, g.rejected, g.levels) for g in found.splits["test"]} == {("a", ("c", "d", "e"), ())}
    assert "12 validation and test groups with levels" in found.notes[-1]
    assert "12 other best ones are left out" in found.notes[-1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ranked": [["a", "b"]]}, "'ranked' has 1 of the two or more levels"),
        ({"ranked": []}, "'ranked' has 0 of the two"),
        ({"ranked": [["a"], ["b"], ["c", "a"]]}, "'a' stands in level 1 and in level 3 of 'ranked'; keep it once"),
        ({"ranked": [["a", "a"], ["b"]]}, "'a' stands twice in level 1"),
        ({"ranked": ["a", "b"]}, r"'ranked' is \['a', 'b'\]; it must be a list of levels, best first"),
        ({"ranked": [["a"], []]}, "level 2 of 'ranked' is empty"),
        ({"ranked": [["a"], [" "]]}, "'ranked' holds ' '; each of it must be a text"),
        ({"ranked": [["a"], ["b"]], "chosen": "a"}, "both 'ranked' and 'chosen'; keep 'ranked', or chosen"),
        ({"ranked": [["a"], ["b"]], "scores": [[1]]}, "'scores' is .*a number for each response of 'ranked'"),
        ({"ranked": [["a"], ["b"]], "scores": [[1], [0]]}, "'scores' holds 0; scores are numbers above 0"),
        (
            {"ranked": [["a"], ["b"]], "prompt": None},
            "'ranked' without a prompt; write a finished 'prompt', or",
        ),
        ({"ranked": [["a"], ["&amp;", "&"]], "prompt": None, "history": ["x"]}, "'&' stands twice in level 2"),
    ],
)
def test_bad_rows_with_levels(tmp_path, bad, message):
    file = write(tmp_path / "rows.jsonl", [RANKED, {"prompt": "p"} | bad])
    with pytest.raises(UserError, match=rf"rows\.jsonl, row 2: {message}"):
        load_preferences(file, seed=0)


@pytest.fixture(scope="module")
def rows_with_histories(tmp_path_factory) -> PreparedData:
    folder = tmp_path_factory.mktemp("histories")
    rows = [
        {"history": ["w10", "w11"], "ranked": [["w1", "w2"], ["w3"], ["w4", "w5", "w6"]]},
        {"history": ["w12"], "ranked": [["w2"], ["w7"]]},
    ]
    config = DataConfig(source=Source(path=write(folder / "rows.jsonl", rows)))
    return prepare(config, 0, folder / "data", lambda _: None)


def test_rows_with_a_history_are_prompted_by_the_template_and_may_list_their_candidates(rows_with_histories):
    data = rows_with_histories
    assert data.items["title"].tolist() == ["w1", "w10", "w11", "w12", "w2", "w3", "w4", "w5", "w6", "w7"]
    assert data.stored_negatives() == [3, 1]
    require_negatives(data.stored_negatives(), 2, data.ragged)
    tokenizer = word_tokenizer()
    template = TemplateConfig(item="{title} ", preamble="", request="{candidates} ", candidate="{title} ", chat="never")
    encode = GroupTokenizer(tokenizer, make_template(template, tokenizer), 99)
    listed = ListedGroups(groups_from_rows(data.train), encode, 2, responses=True, as_stored=False)
    for epoch in range(3):
        first, second = listed(0, epoch), listed(1, epoch)
        assert first.levels == (0, 0, 1, 2, 2)
        assert second.levels == ()
        titles = [tokenizer.decode(branch[:1]) for branch in first.branches]
        assert sorted(tokenizer.decode(first.prefix).split()[-5:]) == sorted(titles)
    plain = TemplateConfig(item="{title} ", preamble="", request="", chat="never")
    encode = GroupTokenizer(tokenizer, make_template(plain, tokenizer), 99)
    assert [group.levels for group in tokenize_rows(data.train, encode)] == [(0, 0, 1, 2, 2, 2), ()]
    sft = tokenize_rows(data.train, encode, negatives=0)
    assert [[tokenizer.decode(b[:1]) for b in group.branches] for group in sft] == [["w1"], ["w2"]]


def test_what_does_not_take_levels_says_so(made, rows_with_histories, log, tmp_path):
    leveled, name = made["ratings, time"], "objective.name"
    for objective in ("mult_dpo", "plackett_luce", "recpo"):
        require_levels(OBJECTIVES[objective](), objective, leveled)
    with pytest.raises(UserError, match=rf"{name}=dmpo compares one positive .* set objective.name=mult_dpo"):
        require_levels(OBJECTIVES["dmpo"](), "dmpo", leveled)
    with pytest.raises(UserError, match=rf"{name}=recpo takes its margins from .* 2 of 2 training groups"):
        require_levels(OBJECTIVES["recpo"](), "recpo", rows_with_histories)
    require_levels(OBJECTIVES["recpo"](margin_weight=0), "recpo", rows_with_histories)
    plain = prepared(tmp_path / "plain")
    for objective in set(OBJECTIVES) - {"recpo"}:
        require_levels(OBJECTIVES[objective](), objective, plain)

    config = RunConfig.model_validate({"data": {"path": str(leveled.path)}, "sft": {"history_order": "shuffled"}})
    with pytest.raises(UserError, match="several positives or levels .* set sft.history_order=given"):
        require_reorderable(config, rows_with_histories)
    with pytest.raises(UserError, match="hard negatives cannot be told; prepare the data with data.levels=none"):
        mine_hard_negatives("no model", config, tmp_path / "hard", 2, 0, None, lambda _: None)
    for changes, words in (
        ({"levels": "repeats", "repeats": "first"}, "set data.repeats=keep"),
        ({"levels": "none"}, "level_likes has no effect with levels=none"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(log, **changes)
    ready = settings(write(tmp_path / "rows.jsonl", [RANKED]), levels="ratings")
    with pytest.raises(UserError, match="data.levels=ratings ranks the likes of a log, but preferences rows say"):
        prepare(ready, 0, tmp_path / "out", lambda _: None)
