"""A tiny GGUF file and wheels around given files."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 4
WORDS = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "he", "▁he", "at", "▁heat"]


def write_gguf(
    file: Path, *, architecture: str = "llama", tokenizer: str | None = "llama", leave_out: str = "", seed: int = 0
) -> None:
    """A llama with random weights in Q8_0 and a SentencePiece vocabulary with bytes."""
    writer = GGUFWriter(file, architecture)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if tokenizer is not None:
        writer.add_tokenizer_model(tokenizer)
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(n) for n in range(len(tokens))])
        kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
        writer.add_token_types([*kinds, *[TokenType.NORMAL] * len(WORDS)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    for name, shape in _shapes(len(tokens)).items():
        if name != leave_out:
            values = np.random.default_rng([seed, len(name)]).standard_normal(shape).astype(np.float32) / 4
            if len(shape) == 2:
                kind = GGMLQuantizationType.Q8_0
                writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_v.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
        }
    return shapes


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> str:
    """A wheel that pip takes; its sha256."""
    stem = f"{name.replace('-', '_')}-{version}"
    meta = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        for path, text in meta.items():
            archive.writestr(f"{stem}.dist-info/{path}", text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()
