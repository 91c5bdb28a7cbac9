"""`dmpo bench gate`: compare a run with a baseline; memory may be 5 % and ratios of speed 25 % worse."""

import json
from pathlib import Path
from typing import Any

from dmpo_dist.errors import UserError

MEMORY_TOLERANCE, SPEED_TOLERANCE = 0.05, 0.25
KEYS = ("cells", "model", "device_type", "dtype", "threads", "rounds", "with_trl")
LENGTHS = ("prompt", "negatives", "vocab", "response")


def read_baseline(file: Path) -> dict[str, Any]:
    """Read a file that ``dmpo bench speed --json`` wrote.

    Raises:
        UserError: the file cannot be read, or is another one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--baseline {file}: cannot be read ({error}); write one with dmpo bench speed --json"
        ) from None
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(
            f"--baseline {file}: has no {', '.join(missing)}; give a file that dmpo bench speed --json wrote"
        )
    for cell in content["cells"]:
        cell.setdefault("implementations", cell.get("contestants"))  # their name in baselines of earlier versions
    return content


def violations(baseline: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """A line for each figure of a cell that is worse than the baseline's by more than its tolerance.

    Compared are our memory in MiB and our speed relative to TRL and to separate rows: ratios change less between
    machines than seconds do. A ratio that one of the runs lacks is not compared.
    """
    lines = []
    found = {_lengths(cell): cell for cell in measured["cells"]}
    for before in baseline["cells"]:
        where = "P={} K={} V={} R={}".format(*_lengths(before))
        now = found.get(_lengths(before))
        if now is None:
            lines.append(f"{where}: was not measured")
            continue
        had, has = (cell["implementations"]["ours"]["peak_memory_mib"] for cell in (before, now))
        if has > had * (1 + MEMORY_TOLERANCE):
            lines.append(
                f"{where}: memory {has:.1f} MiB is {has / had - 1:.0%} above the baseline's {had:.1f}; "
                f"{MEMORY_TOLERANCE:.0%} is allowed"
            )
        for other in ("trl", "unshared"):
            had, has = before[f"speedup_{other}"], now[f"speedup_{other}"]
            if had is not None and has is not None and has < had * (1 - SPEED_TOLERANCE):
                lines.append(
                    f"{where}: speed-up over {other} {has:.2f} is {1 - has / had:.0%} below the baseline's {had:.2f}; "
                    f"{SPEED_TOLERANCE:.0%} is allowed"
                )
    return lines


def _lengths(cell: dict[str, Any]) -> tuple[int, ...]:
    return tuple(cell[name] for name in LENGTHS)
