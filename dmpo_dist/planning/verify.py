"""``dmpo plan --verify``: predicted and measured peaks on this machine's CPU."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dmpo_dist.errors import UserError
from dmpo_dist.planning.cases import SMALL, Case
from dmpo_dist.planning.memory import Term, peak_bytes
from dmpo_dist.planning.plan import make_rank

TOLERANCE = 0.15


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured bytes of a case, above the framework's base, on the rank that needs most."""

    case: Case
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1

    @property
    def good(self) -> bool:
        return abs(self.error) <= TOLERANCE


def verify(cases: Sequence[Case]) -> Iterator[Outcome]:
    """Predict and measure ``cases`` one after the other; yields each outcome."""
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="dmpo-plan-") as folder:
            predicted = predict(case, Path(folder))
            yield Outcome(case, predicted, measure(case, Path(folder)))


def predict(case: Case, folder: Path) -> int:
    """The predicted bytes above the framework's base, from a config.json alone."""
    return peak_bytes([term for term in terms(case, folder) if term.name != "framework"])


def terms(case: Case, folder: Path) -> list[Term]:
    """The terms of a case's memory on the CPU, computed as for any plan; writes the config.json to ``folder``."""
    model = folder / "config"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(case.transformers_config))
    return make_rank(case.run_config(str(model)), case.row, case.ranks, cuda=False, backend="two_part").device_terms()


def measure(case: Case, folder: Path) -> int:
    """The measured bytes above the framework's base, by training in separate processes.

    Raises:
        UserError: the processes failed.
    """
    for name, which in (("small", SMALL), ("model", case)):
        _write_model(which, folder / name)
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks), "--standalone"]
    log = folder / "log.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as out:
        command += ["-m", "dmpo_dist.planning.measure", str(folder / "case.json")]
        done = subprocess.run(command, stdout=out, stderr=out, env=environment, check=False)
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-30:])
        raise UserError(
            f"--verify: the processes of '{case.name}' ended with exit code {done.returncode}; is there memory left? "
            f"Their last lines:\n{last}"
        )
    return json.loads((folder / "result.json").read_text())["peak"]


def _write_model(case: Case, folder: Path) -> None:
    """Write a random model and a tokenizer, which loading requires though training on ids does not use it."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    values = dict(case.transformers_config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
