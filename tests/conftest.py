"""Tiny models, random groups and the prepared world that several test files share."""

import os
import random
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from dmpo_dist.data.tokenization import TokenGroup

torch.set_num_threads(1)
# A shell's background job and nohup ignore these signals, and so would all commands that tests start and interrupt.
# With a handler of ours they come to their default in each new program.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


class ByFile(LoadScopeScheduling):
    """A file's tests go to one process of pytest-xdist, and those of the folder ``integration`` all to the same one.

    So what a file prepares is prepared once, and no two Ray clusters run at a time. xdist's own ``loadgroup`` says it
    in the ids of tests, which pytest 9.2 no longer lets it change: it sends every test alone, without a word.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "integration" if "/integration/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter):
    """The table of tests/faults, where some of it ran: what was tried, and what came out clean."""
    tally = sys.modules.get("tally")
    if tally is not None and tally.TRIED:
        terminalreporter.section("faults")
        terminalreporter.write_line(tally.table())


def tiny_model(kind: str, vocab: int = 97, window: int | None = None, seed: int = 0, **extra):
    """A random causal LM with log-probs that differ: 2-4 layers, grouped-query heads."""
    import transformers

    torch.manual_seed(seed)
    base = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": vocab, "max_position_embeddings": 256, "head_dim": 8,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**base | extra)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**base | extra)
    elif kind == "mistral":
        config = transformers.MistralConfig(sliding_window=window, **base | extra)
    elif kind == "gemma3":
        types = ["sliding_attention", "full_attention"]
        more = {"sliding_window": window or 64, "query_pre_attn_scalar": 8, "layer_types": types}
        config = transformers.Gemma3TextConfig(**base | more | extra)
    elif kind == "gemma2":
        more = {"sliding_window": window or 64, "query_pre_attn_scalar": 8}
        config = transformers.Gemma2Config(**base | more | extra)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=vocab,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            **extra,
        )
    elif kind == "gpt_oss":
        config = transformers.GptOssConfig(num_local_experts=2, num_experts_per_tok=1, **base | extra)
    elif kind == "mamba2":
        config = transformers.Mamba2Config(
            hidden_size=32, num_hidden_layers=2, vocab_size=vocab, state_size=8, num_heads=8, head_dim=8, n_groups=1
        )
    else:
        raise ValueError(kind)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.train()


def word_tokenizer(words: int = 94):
    """A fast tokenizer of whole words w0, w1 .. after <pad>, <s> and </s>: 97 ids as in ``tiny_model``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": 3 + i for i in range(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def random_groups(
    count: int, seed: int = 0, vocab: int = 97, prompt: int = 20, response: int = 6, k: int = 3
) -> list[TokenGroup]:
    """Ragged groups: prompts of 1 to ``prompt`` tokens, responses of 1 to ``response``, now and then a duplicate."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(n)]

    groups = []
    for _ in range(count):
        branches = [tokens(rng.randint(1, response)) for _ in range(rng.randint(1, k) + 1)]
        if len(branches) > 2 and rng.random() < 0.3:
            branches[2] = branches[1]
        unscored = [rng.choice([0, 0, 1]) if len(branch) > 1 else 0 for branch in branches]
        if len(branches) > 2 and branches[2] == branches[1]:
            unscored[2] = unscored[1]
        groups.append(TokenGroup(tokens(rng.randint(1, prompt)), tuple(branches), tuple(unscored)))
    return groups


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Prepared data, a model and an adapter (``worlds.World``), made once: among processes, by the first that asks."""
    from worlds import World, make_world  # here, as the import takes seconds that most files do not need

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "world.lock"):
        if not (folder / "world").exists():
            make_world(folder / "world")
    return World(folder / "world")


@pytest.fixture(scope="session")
def shop(world, tmp_path_factory) -> Iterator:
    """One workshop for all tests of tests/faults that start commands: importing what they need takes longest."""
    from shop import Shop  # of tests/faults

    shop = Shop(world, tmp_path_factory.mktemp("shop"))
    yield shop
    shop.close()


@pytest.fixture
def groups() -> list[TokenGroup]:
    return random_groups(4, seed=3)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
