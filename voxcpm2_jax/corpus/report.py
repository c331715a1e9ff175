"""The doctor's report: report.json, a picture of the distributions, and tables on standard error."""

import itertools
import json
import pathlib

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.corpus.faults import FAULTY
from voxcpm2_jax.processes import say


def write(report: dict, distributions: dict[str, np.ndarray], directory: pathlib.Path) -> None:
    """Writes report.json and, where matplotlib is installed, a picture of the distributions."""
    files.replace_file(directory / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    _draw(directory / "distributions.png", distributions)


def show(report: dict) -> None:
    """Prints the report as tables on standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True)
    hours = Table(title=f"{report['clips']} clips, {report['hours']:.2f} h, {report['speakers']} speakers")
    for column in ("language", "hours", "dataset", "hours", "speaker", "hours"):
        hours.add_column(column, justify="right" if column == "hours" else "left")
    columns = [list(report[name].items()) for name in ("by_language", "by_dataset", "by_speaker")]
    for cells in list(itertools.zip_longest(*columns, fillvalue=("", None)))[:12]:
        hours.add_row(*(x for name, value in cells for x in (escape(name), "" if value is None else f"{value:.2f}")))
    console.print(hours)
    table = Table(title="findings" if report["findings"] else "no findings")
    for column in ("", "fault", "clips", "meaning", "for example"):
        table.add_column(column, justify="right" if column == "clips" else "left", overflow="fold")
    for finding in report["findings"]:
        example = finding["examples"][0]
        table.add_row(finding["level"], finding["kind"], str(finding["count"]), finding["meaning"], escape(example))
    if report["findings"]:
        console.print(table)
    for finding in report["findings"]:
        if finding["kind"] == FAULTY:
            console.print("faulty lines:", *finding["examples"], sep="\n", markup=False, highlight=False, soft_wrap=True)
    forecast = report["forecast"]
    if "rows_per_epoch" in forecast:
        console.print(
            f"rows of {forecast['slots']} slots and {forecast['patches']} patches: {forecast['rows_per_epoch']} per epoch, "
            f"{forecast['steps_per_epoch']} steps of {forecast['rows']} rows; {100 * forecast['slots_used']:.1f} % of slots "
            f"and {100 * forecast['patches_used']:.1f} % of patches used"
        )


def _draw(path: pathlib.Path, distributions: dict[str, np.ndarray]) -> None:
    try:
        import matplotlib
    except ImportError:
        say(f"{path.name} is not drawn: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(distributions), figsize=(10, 3), constrained_layout=True)
    labels = {"duration_sec": "duration (s)", "characters_per_sec": "characters per second"}
    for axis, (name, values) in zip(axes, distributions.items()):
        axis.hist(values, bins=60)
        axis.set(xlabel=labels[name], ylabel="clips")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
