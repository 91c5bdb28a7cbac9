"""The words of a title: readable whatever the tokenizer does to them, and their log-probs those of the whole title."""

import numpy as np
import pytest
from conftest import random_groups, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.explanation.tokens import readable_pieces, sum_pieces
from dmpo_dist.explanation.words import END
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.modeling.scoring import per_token

TITLES = ("Heat (1995)", "Léon: 日本 🎬", "Amélie", "naïve", "Ōkami")


def byte_level(merges=()):
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback():
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "H": 257, "e": 258}
    return Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize(
    "backend",
    [
        byte_level(),
        byte_level([("Ã", "©"), ("L", "Ã©")]),
        byte_level([("L", "Ã"), ("©", "o"), ("Ċ", "H"), ("Ċ", "L")]),  # parts of characters; and over the boundary
        byte_fallback(),
    ],
    ids=["bytes", "characters", "across", "fallback"],
)
def test_the_pieces_are_the_title_and_hold_every_token_once(backend, title):
    prompt, terminator = "Tron\n", "\n\n"
    text = prompt + title + terminator
    encoded, alone = backend.encode(text), backend.encode(prompt).ids
    same = next((i for i, (a, b) in enumerate(zip(alone, encoded.ids, strict=False)) if a != b), len(alone))
    spans = encoded.offsets[same:]
    pieces = readable_pieces(text, spans, len(prompt), len(prompt) + len(title))
    assert "".join(piece.text for piece in pieces[:-1]) + pieces[-1].text == title + END
    assert [i for piece in pieces for i in range(len(spans))[piece.tokens]] == list(range(len(spans)))
    numbers = np.random.default_rng(0).normal(size=len(spans))
    assert sum_pieces(pieces, numbers).sum() == pytest.approx(numbers.sum())


def test_characters_in_many_bytes_are_one_piece():
    text = "x日本</s>"
    pieces = readable_pieces(text, [(1, 2), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (3, 7)], 1, 3)
    assert [(p.text, p.tokens) for p in pieces] == [("日", slice(0, 3)), ("本", slice(3, 6)), (END, slice(6, 7))]


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_sum_to_what_the_responses_score(shared):
    """Also where a response begins with tokens that are prompt, and where equal positions predict several titles."""
    groups = [
        type(g)(g.prefix, g.branches[:1], g.scored_from[:1]) for g in random_groups(7, seed=5) if len(g.branches[0]) > 1
    ]
    model = tiny_model("llama").eval()
    use_backend(model, "two_part" if shared else "unshared")
    log_probs, layout = LogProbModel(model), lay_out(groups, shared)
    whole, single = log_probs(layout).detach(), log_probs(per_token(layout)).detach()
    lengths = [len(group.branches[0]) - group.scored_from[0] for group in groups]
    assert len(single) == sum(lengths)
    sums = [part.sum().item() for part in single.split(lengths)]
    np.testing.assert_allclose(sums, whole.numpy(), atol=1e-5)
