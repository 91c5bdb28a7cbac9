"""The output of `dmpo bench scaling`: a row for each cell as Parquet and Markdown, and four plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.figures.style import GREY, add_legend, drawing, log_ticks, looks, save_png
from dmpo_dist.tables import Table, markdown, terminal, texts

SETTING = ["zero", "offload", "token_budget"]
PANELS = {
    "groups_per_second": "Preference groups per second",
    "efficiency": "Efficiency: throughput over the fewest workers' times their ratio",
    "memory_gib_per_worker": "Peak memory of a worker (GiB)",
    "communication_share": "Share of a step in collectives (profiled)",
}
COLUMNS = {
    "mode": ("scaling", "{}"), "setting": ("setting", "{}"), "workers": ("workers", "{}"), "groups": ("groups", "{}"),
    "step_ms": ("step ms", "{:.0f}"), "spread": ("spread", "{}"), "groups_per_second": ("groups/s", "{:.1f}"),
    "efficiency": ("eff.", "{:.2f}"), "efficiency_cpu": ("CPU eff.", "{:.2f}"),
    "memory_gib_per_worker": ("GiB", "{:.2f}"), "communication_share": ("comm.", "{:.0%}"),
    "waiting_share": ("waits", "{:.0%}"),
}  # fmt: skip
EXPLANATION = (
    "setting: ZeRO stage, token budget; step: median, spread: quartiles; eff.: groups/s over those of the fewest "
    "workers times the ratio of workers; "
    "CPU eff.: the same by CPU seconds per group, which a busy machine disturbs less; comm.: time in "
    "collectives, waiting for other ranks included; waits: share of the step a rank's thread slept"
)


def scaling_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for each cell and kind of scaling; a cell at the fewest workers belongs to both kinds.

    Args:
        results: the result of ``scaling.run_scaling``.

    Returns:
        The figures of ``scaling.measure`` with ``mode`` (strong or weak), ``step_ms`` (median) and its quartiles,
        ``memory_gib_per_worker`` (the largest), ``efficiency`` and ``efficiency_cpu``.
    """
    cells = pd.DataFrame(results)
    seconds = [np.percentile(steps, [25, 50, 75]) for steps in cells["step_seconds"]]
    for column, index in (("step_ms_low", 0), ("step_ms", 1), ("step_ms_high", 2)):
        cells[column] = [1000 * quartiles[index] for quartiles in seconds]
    cells["memory_gib_per_worker"] = cells["memory_gib"].map(max)
    cells["groups_per_cpu_second"] = cells["groups"] / (cells["cpu_seconds"] * cells["workers"])
    fewest = cells["workers"].min()
    first = cells[cells["workers"] == fewest].set_index(SETTING)
    base_groups = first["groups"].iloc[0]
    rows = []
    for mode, groups in (("strong", base_groups), ("weak", base_groups * cells["workers"] // fewest)):
        members = cells[cells["groups"] == groups].assign(mode=mode)
        base = first.loc[pd.MultiIndex.from_frame(members[SETTING])]
        ratio = members["workers"] / fewest
        members["efficiency"] = members["groups_per_second"] / (base["groups_per_second"].to_numpy() * ratio)
        members["efficiency_cpu"] = members["groups_per_cpu_second"] / base["groups_per_cpu_second"].to_numpy()
        rows.append(members)
    return pd.concat(rows).sort_values(["mode", *SETTING, "workers"]).reset_index(drop=True)


def report_scaling(results: Sequence[dict[str, Any]], folder: Path, console: Console) -> None:
    """Write scaling.parquet, scaling.md and scaling.png to ``folder`` and show the table."""
    table = scaling_table(results)
    table.drop(columns=["kind"], errors="ignore").to_parquet(folder / "scaling.parquet")
    shown = table.assign(
        setting=[_setting(row) for row in table[SETTING].itertuples(index=False)],
        spread=[f"{low:.0f}–{high:.0f}" for low, high in zip(table["step_ms_low"], table["step_ms_high"], strict=True)],
    )
    cells = [[form.format(row[name]) for name, (_, form) in COLUMNS.items()] for _, row in shown.iterrows()]
    shown_table = Table("", [heading for heading, _ in COLUMNS.values()], texts(cells), text_columns=len(COLUMNS))
    first = results[0]
    about = f"{first['device']}, {first['parameters']:,} parameters, commit {first['commit']}."
    text = "\n\n".join(["# Scaling", about, markdown(shown_table), EXPLANATION + "."])
    write_whole(folder / "scaling.md", text + "\n")
    draw_scaling(table, folder / "scaling.png")
    console.print(terminal(shown_table))
    console.print(EXPLANATION, highlight=False)
    console.print(f"written to {folder}/scaling.parquet, scaling.md and scaling.png", highlight=False)


@drawing()
def draw_scaling(table: pd.DataFrame, file: Path) -> None:
    """Draw a PNG of throughput, efficiency, memory and communication over workers; weak scaling is dashed."""
    settings = list(dict.fromkeys(table[SETTING].itertuples(index=False, name=None)))
    of_setting = looks(settings)
    figure = Figure(figsize=(10, 7.2))
    for axes, (column, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for setting, look in of_setting.items():
            chosen = table[(table[SETTING] == list(setting)).all(axis=1)]
            for mode, style in (("strong", "-"), ("weak", "--")):
                rows = chosen[chosen["mode"] == mode]
                label = f"{_setting(setting)}, {mode}"
                axes.plot(
                    rows["workers"],
                    rows[column],
                    style,
                    marker=look.marker,
                    color=look.colour,
                    markersize=4,
                    label=label,
                )
        axes.set_title(title, fontsize=9)
        log_ticks(axes, table["workers"])
        axes.set_xlabel("workers")
        axes.set_ylim(bottom=0)
        if column == "efficiency":
            axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    add_legend(figure, columns=4)
    save_png(figure, file)


def _setting(setting: Sequence[Any]) -> str:
    zero, offload, budget = setting
    return f"ZeRO-{zero}" + (" offload" if offload else "") + f", {budget}"
