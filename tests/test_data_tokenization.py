"""Token groups against whole texts tokenized at once, on tokenizers that merge over every boundary they can."""

import os
import random
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_template import CHATML
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dmpo_dist.config import TemplateConfig
from dmpo_dist.data.messages import text_of
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, check_titles
from dmpo_dist.errors import UserError

CORPUS = [
    "The Matrix (1999), ...And Justice for All (1979), What's Up, Doc? (1972), Amélie (2001), 東京物語 (1953)",
    "A user liked these titles, oldest first:\n- Heat\n- Alien\nThe title this user will like next:\n",
    "Next: Heat. Next: Alien! Next: The Thing, The Fly (1958), (1986), Heat,...And Alien,...And Thing,...And",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def wrap(backend, **names):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>", **names})


def byte_level(**names):
    """GPT-2's kind: words are split by a pattern, then bytes merge."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    # as most tokenizers do on their own account; here the begin token is the template's business
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return wrap(backend, **names)


def sentencepiece_like(split):
    """Llama's kind: spaces become a letter, every text begins with one; with and without a split into words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if split:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    fallback = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    backend.train_from_iterator([word for line in CORPUS for word in line.split(",")], trainer)
    return wrap(backend, unk_token="<unk>")


TOKENIZERS = {
    "byte level": byte_level(),
    "metaspace": sentencepiece_like(split=True),
    "llama": sentencepiece_like(split=False),
    "no begin token": byte_level(bos_token=None),
}
if os.environ.get("DMPO_STORIES"):
    TOKENIZERS["stories260K"] = AutoTokenizer.from_pretrained(os.environ["DMPO_STORIES"])


def pieces(tokenizer, ids):
    """What ids spell, however it is cut."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def assert_exact(tokenizer, config, groups):
    """Ids are those of prompt and response tokenized together, unless that merges the two: then the prompt keeps its
    own, and the response is spelled by itself."""
    encode = GroupTokenizer(tokenizer, make_template(config, tokenizer), max_length=10_000)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for group in groups:
        items = "".join(config.item.replace("{end}", tokenizer.eos_token).replace("{title}", t) for t in group.history)
        prompt = (tokenizer.bos_token or "") + config.preamble + items + config.request
        alone = ids(prompt)
        if not alone:
            with pytest.raises(UserError, match="nothing stands before the response"):
                encode(group)
            continue
        tokens = encode(group)
        assert (tokens.prefix, set(tokens.scored_from), tokens.prefix_scored) == (alone, {0}, ())
        for title, branch in zip((group.positive, *group.negatives), tokens.branches, strict=True):
            response = config.response.replace("{title}", title) + tokenizer.eos_token
            whole = ids(prompt + response)
            if whole[: len(alone)] == alone:
                assert branch == whole[len(alone) :]
            assert pieces(tokenizer, alone + branch) == pieces(tokenizer, whole)


def group(history, *candidates, prompt=None):
    return PreferenceGroup("u1", 0, tuple(history), candidates[0], tuple(candidates[1:]), prompt)


def groups_of(titles, max_history=3):
    return st.builds(
        lambda history, candidates: group(history, *candidates),
        st.lists(titles, max_size=max_history), st.lists(titles, min_size=2, max_size=4),
    )  # fmt: skip


def parts(*texts):
    return st.sampled_from(texts)


TITLES = ["Heat", "The Matrix (1999)", "...And Justice for All (1979)", "Amélie", "東京物語", "A", "), X", "'s Up",
          "What's Up, Doc?", "  spaces  ", "\ttab", "9", "1999", "🎬", "ing", "é", "e\u0301", "\u00a0x"]  # fmt: skip
real_titles = st.one_of(
    st.sampled_from(TITLES), st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=8)
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(
    st.lists(groups_of(real_titles), min_size=1, max_size=3),
    st.builds(
        TemplateConfig,
        preamble=parts("", "Liked:\n"),
        item=parts("- {title}\n", "{title}{end}", "{title},", "{title}, ", "{title}", '"{title}" '),
        request=parts("", "Next:\n", "Next: ", "Next", " ", "."),
        response=parts("{title}", " {title}", '"{title}"'),
    ),
)
@settings(max_examples=60, deadline=None)
@example(  # the positive alone says nothing about "),..." being cut otherwise than "," + "..."
    [group(["The Matrix (1999)"], "Heat", "...And Justice for All (1979)")],
    TemplateConfig(item="{title},", request=""),
)
def test_candidates_are_tokenized_as_if_whole_but_for_the_boundary(tokenizer, groups, config):
    assert_exact(tokenizer, config, groups)


LETTERS = "ab ,\n"  # no merge has a line break, as with most tokenizers


def merging_tokenizer(merges, prepend=False, bos="<s>"):
    """BPE over four letters and nothing that splits a text, so that merges cross all boundaries."""
    known = dict.fromkeys(["▁", *LETTERS, *map("".join, merges)])
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(known)}, merges=merges))
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrap(backend, bos_token=bos)


@st.composite
def merging_tokenizers(draw):
    known, merges = ["▁", *LETTERS.strip()], []
    for left, right in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=25)):
        pair = known[left % len(known)], known[right % len(known)]
        if "".join(pair) not in known:
            merges.append(pair)
            known.append("".join(pair))
    return merging_tokenizer(merges, draw(st.booleans()), draw(st.sampled_from(["<s>", None])))


_letters = st.text(LETTERS, max_size=3)
_short_titles = st.text(LETTERS, min_size=1, max_size=4)


@given(
    merging_tokenizers(),
    st.builds(
        TemplateConfig,
        preamble=_letters,
        item=st.tuples(_letters, _letters, parts("", "", "{end}")).map(lambda t: t[0] + "{title}" + t[1] + t[2]),
        request=_letters,
        response=_letters.map(lambda before: before + "{title}"),
    ),
    st.lists(groups_of(_short_titles), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
@example(  # only the negative shows that the prompt's last space is free to merge
    merging_tokenizer([(" ", " ")]),
    TemplateConfig(preamble="", item="{title}", request=" "),
    [group(["a"], "a", " ")],
)
def test_any_merges_across_the_boundary_are_exact(tokenizer, config, groups):
    assert_exact(tokenizer, config, groups)


@pytest.mark.parametrize(
    ("options", "ends", "responses"),
    [
        # this tokenizer makes one id of " Thing", but not of all words behind a space: it stays with the prompt
        ({"request": "Next: "}, "Next: ", ["Thing</s>", "~</s>"]),
        # ",..." is one id: the prompt keeps its own, whichever candidate comes
        ({"item": "{title},", "request": ""}, "Heat,", ["Thing</s>", "...And Justice</s>"]),
    ],
)
def test_what_is_scored_is_the_response_whatever_merges_with_the_prompt(options, ends, responses):
    tokenizer = TOKENIZERS["byte level"]
    encode = GroupTokenizer(tokenizer, make_template(TemplateConfig(**options), tokenizer), 999)
    titles = [response.removesuffix("</s>") for response in responses]
    tokens = encode(group(["Heat"], *titles))
    prompt = encode.template.render(("Heat",)).text
    assert prompt.endswith(ends)
    assert tokens.prefix == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokens.scored_from == (0, 0)
    assert [tokenizer.decode(branch) for branch in tokens.branches] == responses
    for title, branch in zip(titles, tokens.branches, strict=True):  # the other candidates have no part in it
        assert encode(group(["Heat"], title)).branches == (branch,)


def test_a_cut_or_padding_stored_with_the_tokenizer_is_not_applied(tmp_path):
    tokenizer = byte_level()
    template = make_template(TemplateConfig(), tokenizer)
    expected = GroupTokenizer(tokenizer, template, 999)(group(["Heat"], "Alien", "The Fly"))
    tokenizer.backend_tokenizer.enable_truncation(6)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    assert stored.backend_tokenizer.truncation, "the test has lost its subject"
    assert GroupTokenizer(stored, template, 999)(group(["Heat"], "Alien", "The Fly")) == expected


def test_ready_made_prompts_are_used_as_they_are():
    tokenizer = TOKENIZERS["byte level"]
    encode = GroupTokenizer(tokenizer, make_template(TemplateConfig(), tokenizer), 999)
    tokens = encode(group([], "Heat", "Alien", prompt="What next? "))
    decoded = [tokenizer.decode(tokens.prefix + branch) for branch in tokens.branches]
    assert decoded == ["<s>What next? Heat</s>", "<s>What next? Alien</s>"]


def test_a_chat_is_tokenized_like_the_chat_template_says():
    tokenizer = byte_level(eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    config = TemplateConfig()
    tokens = GroupTokenizer(tokenizer, make_template(config, tokenizer), 999)(group(["Heat"], "Alien", "The Fly"))
    user = {"role": "user", "content": f"{config.preamble}- Heat\n{config.request}"}
    for title, branch in zip(["Alien", "The Fly"], tokens.branches, strict=True):
        text = tokenizer.apply_chat_template([user, {"role": "assistant", "content": title}], tokenize=False)
        assert tokens.prefix + branch == tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        assert branch[-1] == tokenizer.eos_token_id


def test_a_conversation_of_several_messages_is_tokenized_like_the_chat_template_says():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    encode = GroupTokenizer(tokenizer, make_template(TemplateConfig(), tokenizer), 500)
    turns = [{"role": role, "content": f"{role}, Alien"} for role in ("system", "user", "assistant", "user")]
    found = encode(group((), "Heat", "...And", prompt=text_of(turns)))
    for title, branch in zip(("Heat", "...And"), found.branches, strict=True):
        whole = [*turns, {"role": "assistant", "content": title}]
        text = tokenizer.apply_chat_template(whole, tokenize=False).rstrip("\n")
        assert found.prefix + branch == tokenizer(text, add_special_tokens=False)["input_ids"]


def _words(rng, count):
    return " ".join(rng.choice(["Heat", "Alien", "Thing"]) for _ in range(count))


@given(st.integers(0, 999), st.integers(1, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_truncation_drops_the_oldest_titles_and_no_more_than_needed(seed, count, whole_fits):
    tokenizer = TOKENIZERS["byte level"]
    rng = random.Random(seed)
    template = make_template(TemplateConfig(preamble="Liked:\n", item="{title}{end}", request="Next:\n"), tokenizer)
    history = [_words(rng, 3) for _ in range(count)]  # of 3 tokens and an end token each
    candidates = ["Heat", _words(rng, rng.randint(1, 9)), _words(rng, rng.randint(1, 9))]

    def longest(kept):
        prompt = template.render(tuple(kept)).text
        return max(len(tokenizer(prompt + t + "</s>", add_special_tokens=False)["input_ids"]) for t in candidates)

    limit = longest(history) - (0 if whole_fits else rng.randint(1, longest(history) - longest([])))
    encode = GroupTokenizer(tokenizer, template, max_length=limit)
    tokens = encode(group(history, *candidates))
    text = tokenizer.decode(tokens.prefix + tokens.branches[0])
    fitting = [drop for drop in range(count + 1) if longest(history[drop:]) <= limit]
    kept = history[min(fitting) :]
    assert text == template.render(tuple(kept)).text + "Heat</s>"
    assert encode.truncated == (len(kept) < count)
    assert encode.dropped_titles == count - len(kept)
    encode(group(history, *candidates))
    assert (encode.truncated, encode.dropped_titles) == (2 * (len(kept) < count), 2 * (count - len(kept)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(16, 80))
@settings(max_examples=60, deadline=None)
def test_uneven_titles_are_dropped_from_the_oldest_on_until_they_fit(lengths, limit):
    tokenizer = TOKENIZERS["byte level"]
    rng = random.Random(limit)
    template = make_template(TemplateConfig(preamble="", item="{title}{end}", request=""), tokenizer)
    history = tuple(_words(rng, n) for n in lengths)
    encode = GroupTokenizer(tokenizer, template, max_length=limit)
    tokens = encode(group(history, "Heat", "Alien Thing"))
    assert len(tokens.prefix) + max(map(len, tokens.branches)) <= limit
    kept = history[encode.dropped_titles :]
    if encode.dropped_titles:
        roomier = GroupTokenizer(tokenizer, template, max_length=999)
        one_more = roomier(group(history[encode.dropped_titles - 1 :], "Heat", "Alien Thing"))
        assert len(one_more.prefix) + max(map(len, one_more.branches)) > limit, "no more is dropped than needed"
    assert tokenizer.decode(tokens.prefix + tokens.branches[1]) == template.render(kept).text + "Alien Thing</s>"


@given(
    st.lists(st.text(string.ascii_letters + " ,.()'", min_size=1, max_size=12), min_size=1, max_size=5),
    parts("{title}{end}", "- {title}{end}", "* {title}!{end}"),
    parts("", "Liked:\n", "My titles: "),
    st.sampled_from(["byte level", "no begin token"]),
    st.integers(25, 60),
)
@settings(max_examples=150, deadline=None)
def test_history_scores_are_exactly_titles_with_their_ends(history, item, preamble, name, limit):
    """An id counts if all of its characters belong to a title, its end or the spaces before it; the very first id has
    nothing before it."""
    tokenizer = TOKENIZERS[name]
    suffix = "!" if "!" in item else ""
    config = TemplateConfig(preamble=preamble, item=item, request="Next:\n", response="{title}" + suffix)
    encode = GroupTokenizer(tokenizer, make_template(config, tokenizer), limit, score_history=True)
    tokens = encode(group(history, "Heat"))
    before = item.split("{title}")[0]
    owned = [False] * len((tokenizer.bos_token or "") + preamble)
    if not before and preamble.endswith(" "):
        owned[-1] = True
    for title in history[encode.dropped_titles :]:
        owned += [letter == " " for letter in before] + [True] * len(title + suffix + "</s>")
    owned += [False] * len("Next:\n")
    expected, start = [], 0
    for index, token in enumerate(tokens.prefix):
        end = start + len(tokenizer.decode([token]))
        if index and all(owned[start:end]):
            expected.append(index)
        start = end
    assert start == len(owned), "the test lost count of characters"
    assert list(tokens.prefix_scored) == expected
    assert sum(tokens.prefix[i] == tokenizer.eos_token_id for i in expected) == len(history) - encode.dropped_titles


def test_history_scores_of_letters_made_of_several_ids():
    tokenizer = TOKENIZERS["byte level"]
    config = TemplateConfig(preamble="", item="{title}{end}", request="")
    encode = GroupTokenizer(tokenizer, make_template(config, tokenizer), 999, score_history=True)
    tokens = encode(group(["Amélie", "🎬 東", "ß"], "Heat"))
    assert tokens.prefix_scored == tuple(range(1, len(tokens.prefix)))
    assert encode(group([], "Heat")).prefix_scored == ()
    plain = GroupTokenizer(tokenizer, encode.template, 999)
    assert plain(group(["Amélie"], "Heat")).prefix_scored == ()


def test_an_id_that_reaches_over_the_end_of_a_title_does_not_count():
    """ "," ends titles and merges with the request's "..."; it does not merge with a candidate's."""
    tokenizer = TOKENIZERS["byte level"]

    def encode(request, *candidates):
        config = TemplateConfig(preamble="", item="{title}{end}", request=request, terminator=",")
        encode = GroupTokenizer(tokenizer, make_template(config, tokenizer), 999, score_history=True)
        tokens = encode(group(["Alien", "Heat"], *candidates))
        return [tokenizer.decode([i]) for i in tokens.prefix], tokens.prefix_scored

    prefix, scored = encode("...And so on: ", "Thing")
    assert scored == tuple(range(1, prefix.index(",...")))
    prefix, scored = encode("", "Thing", "...And Justice for All")
    assert prefix[-1] == ","
    assert scored == tuple(range(1, len(prefix)))


def test_scoring_a_history_that_does_not_end_like_a_response_is_refused():
    tokenizer = TOKENIZERS["byte level"]
    with pytest.raises(UserError, match=r"sft_loss_on is all_titles, but template.item does not end like a response"):
        GroupTokenizer(tokenizer, make_template(TemplateConfig(), tokenizer), 999, score_history=True)


def test_what_does_not_fit_without_any_history_is_refused():
    tokenizer = TOKENIZERS["byte level"]
    template = make_template(TemplateConfig(preamble="", request="Next:\n"), tokenizer)
    needed = len(tokenizer("<s>Next:\nHeat Heat Heat</s>", add_special_tokens=False)["input_ids"])
    case = group(["Alien"] * 5, "Heat", "Heat Heat Heat")
    GroupTokenizer(tokenizer, template, needed)(case)
    with pytest.raises(
        UserError, match=rf"user 'u1': .* take {needed} tokens, more than model.max_length={needed - 1}"
    ):
        GroupTokenizer(tokenizer, template, needed - 1)(case)
    with pytest.raises(UserError, match="model.max_length=8"):
        GroupTokenizer(tokenizer, template, 8)(group([], "Heat", "Alien", prompt="Heat Alien Thing Fly Matrix Doc"))


def test_an_empty_prompt_is_refused():
    tokenizer = TOKENIZERS["no begin token"]
    template = make_template(TemplateConfig(preamble="", item="{title}{end}", request=""), tokenizer)
    encode = GroupTokenizer(tokenizer, template, 999)
    assert encode(group(["Alien"], "Heat", "The Fly")).prefix
    for case in (group([], "Heat", "Alien"), group([], "Heat", "Alien", prompt="")):
        with pytest.raises(UserError, match="nothing stands before the response; .*set template.preamble"):
            encode(case)


def test_titles_are_checked_for_special_tokens_and_unknown_characters():
    tokenizer = TOKENIZERS["byte level"]
    check_titles(["Heat", "<s", "im_start", "東京 🎬"], tokenizer)
    # the last two are not named by the tokenizer (as its end token is), but would become one id all the same
    for token in ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]:
        with pytest.raises(UserError, match="special token .*rename the item") as error:
            check_titles(["Heat", f"The {token} Movie"], tokenizer)
        assert token in str(error.value)
    words = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    check_titles(["aa"], wrap(words, unk_token="<unk>"))
    with pytest.raises(UserError, match="'ab' has characters the tokenizer cannot represent"):
        check_titles(["aa", "ab"], wrap(words, unk_token="<unk>"))
