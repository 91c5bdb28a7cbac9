"""On every kind of tokenizer and template what is scored is the response and its end, for all candidates alike."""

import re
import string
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_chat import KEPT
from test_data_tokenization import CORPUS, SPECIAL, TITLES, byte_level, group, sentencepiece_like, wrap
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dmpo_dist.config import TemplateConfig
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, check_titles
from dmpo_dist.errors import UserError

PLAIN = string.ascii_letters + string.digits + string.punctuation
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def llama3(*more):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *more], trainer)
    return wrap(backend)


def joining():
    """One that joins a space to any word, as pretrained ones do."""
    return llama3(*[" ".join(["x:", *string.ascii_uppercase])] * 50)


def unigram(split):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split, prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *SPECIAL],
        unk_token="<unk>",
        initial_alphabet=[*PLAIN, "\n"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrap(backend, unk_token="<unk>")


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIAL], initial_alphabet=[*PLAIN], show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *(f"x{letter}" for letter in PLAIN)], trainer)
    return wrap(backend, unk_token="<unk>")


KINDS = {
    "byte level": byte_level,
    "llama 3": llama3,
    "joins spaces": joining,
    "llama 2": lambda: sentencepiece_like(False),
    "metaspace": lambda: sentencepiece_like(True),
    "unigram": lambda: unigram(True),
    "unigram, unsplit": lambda: unigram(False),
    "wordpiece": wordpiece,
}
CHATS = {"none": None} | {name: kept[0] for name, kept in KEPT.items()}


@cache
def tokenizer_of(kind, chat="none"):
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(re.findall(r"<\|\w+\|>", str(CHATS))))})
    tokenizer.chat_template = CHATS[chat]
    return tokenizer


def spelled(tokenizer, ids):
    """The text of ids without white space and in small letters: what every kind of tokenizer keeps of one."""
    tokens = [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(ids)]
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        text = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    else:
        text = "".join(tokens).replace("▁", " ")
    text = re.sub("(<0x[0-9A-F]{2}>)+", lambda m: bytes.fromhex(re.sub("<0x|>", "", m[0])).decode(), text)
    return plain(text)


def plain(text):
    return re.sub(r"\s", "", text).lower()


def known(kind):
    tokenizer, out = tokenizer_of(kind), []
    for title in TITLES:
        try:
            check_titles([title], tokenizer)
            out.append(title)
        except UserError:
            pass
    return [
        title for title in out if plain(title) == spelled(tokenizer, tokenizer.encode(title, add_special_tokens=False))
    ]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=8, deadline=None)
def test_scored_ids_are_the_response_and_its_end(kind, chat, data):
    tokenizer, titles = tokenizer_of(kind, chat), st.sampled_from(known(kind))
    tokenizer.chat_template = CHATS[chat]
    config = data.draw(
        st.builds(
            TemplateConfig,
            preamble=st.sampled_from(["Liked:\n", "Liked: "]),
            item=st.sampled_from(["- {title}\n", "{title},", "{title}, ", "{title} ", "- {title}{end}"]),
            request=st.sampled_from(["", "Next:\n", "Next: ", "Next", "Next:  ", "."]),
            response=st.sampled_from(["{title}", "({title})"]),
            terminator=st.sampled_from(["{eos}", "."]),
        )
    )
    history, candidates = (data.draw(st.lists(titles, min_size=n, max_size=4, unique=True)) for n in (0, 2))
    template = make_template(config, tokenizer)
    encode = GroupTokenizer(tokenizer, template, 10_000)
    tokens = encode(group(history, *candidates))
    assert set(tokens.scored_from) == {0}
    assert spelled(tokenizer, tokens.prefix) == plain(template.render(tuple(history)).text)
    for title, branch in zip(candidates, tokens.branches, strict=True):
        assert spelled(tokenizer, branch) == plain(template.render_response(title))
        assert encode(group(history, title)).branches == (branch,), "the other candidates have a part in it"


@pytest.mark.parametrize(
    ("kind", "terminator"), [("wordpiece", "\n"), ("wordpiece", " "), ("wordpiece", "\u241e"), ("unigram", "\u241e")]
)
def test_a_terminator_that_the_tokenizer_drops_or_does_not_know_is_refused(kind, terminator):
    tokenizer = tokenizer_of(kind)
    template = make_template(TemplateConfig(terminator=terminator, chat="never"), tokenizer)
    with pytest.raises(UserError, match="drops the terminator .* no end; set template.terminator"):
        GroupTokenizer(tokenizer, template, 999)


def test_a_title_that_the_tokenizer_drops_is_refused():
    with pytest.raises(UserError, match="no character that the tokenizer keeps"):
        check_titles(["\u200b"], tokenizer_of("wordpiece"))


@pytest.mark.parametrize("kind", ["byte level", "llama 3", "llama 2"])
@pytest.mark.parametrize("item", ["{title}{end}", "- {title}{end}", '"{title}{end}', "{title}{end} / "])
def test_every_history_title_is_scored_from_its_first_id_to_its_end(kind, item):
    """An end token that takes in the white space behind it is an end all the same."""
    tokenizer = KINDS[kind]()
    history = ("Heat (1995)", "Alien", "What's Up, Doc?")
    for greedy in (False, True):
        end = AddedToken("<|over|>", rstrip=greedy, special=True, normalized=False)
        tokenizer.add_special_tokens({"eos_token": end})
        config = TemplateConfig(preamble="A user liked:\n", item=item, request="\nNext:\n", chat="never")
        if not make_template(config, tokenizer).item_ends:
            continue
        tokens = GroupTokenizer(tokenizer, make_template(config, tokenizer), 999, score_history=True)(
            group(history, "Ran")
        )
        scored = spelled(tokenizer, [tokens.prefix[index] for index in tokens.prefix_scored])
        assert scored.replace('"', "") == plain("".join(f"{title}<|over|>" for title in history))


def test_spaces_that_a_prompt_ends_in_are_scored_alike():
    """Joined to "The", not to "12": where a tokenizer joins spaces to words, they belong to all responses."""
    tokenizer = tokenizer_of("joins spaces")
    encode = GroupTokenizer(tokenizer, make_template(TemplateConfig(request="Next: ", chat="never"), tokenizer), 999)
    tokens = encode(group(["Heat"], "The Thing", "12 Monkeys"))
    assert tokenizer.decode(tokens.prefix) + " " == encode.template.render(("Heat",)).text
    assert [tokenizer.decode(ids) for ids in tokens.branches] == [" The Thing</s>", " 12 Monkeys</s>"]
    assert tokens.branches[0][0] == tokenizer.convert_tokens_to_ids("ĠThe")


def test_candidates_that_a_tokenizer_cannot_tell_apart_are_seen():
    for kind, alike in {"wordpiece": True, "llama 3": False}.items():
        tokenizer = tokenizer_of(kind)
        encode = GroupTokenizer(tokenizer, make_template(TemplateConfig(chat="never"), tokenizer), 999)
        assert encode(group(["Alien"], "HEAT", "Ran", "Heat")).ambiguous is alike
        assert not encode(group(["Alien"], "HEAT", "Ran")).ambiguous
