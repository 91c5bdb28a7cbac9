"""Imports that the fork server of ``bench/memory.py`` does once for all processes that it starts."""

from importlib import import_module
from importlib.util import find_spec

from dmpo_dist.quiet import silence_libraries

silence_libraries()
for name in ("peft", "dmpo_dist.bench.memory", *(["trl.trainer.dpo_trainer"] if find_spec("trl") else [])):
    import_module(name)
