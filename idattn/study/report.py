"""The report on a study: tables in markdown, the same numbers in JSON, and figures.

Validation losses are the best of each run, as in the paper; spreads are sample standard deviations over seeds.
Conditions are compared seed by seed, since a seed fixes the data and its order for all of them.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from idattn.config import Config
from idattn.costs import count_parameters
from idattn.evals.paper import RESULTS, setting_note
from idattn.files import write_atomic
from idattn.study.figures import draw
from idattn.study.grid import Cell, best_loss, by_condition, state_of_layer

# What some orderings of the paper's table 4 say: the condition that does better there, and the other.
MEANINGS = {
    ("interdomain", "dual_linear"): "queries read better than a linear readout, input [xi(k), v]",
    ("single_query", "s4d"): "queries read better than a linear readout, generic input",
    ("interdomain", "single_query"): "[xi(k), v] is a better input than a generic one",
    ("interdomain", "s4d"): "interdomain is better than s4d",
    ("interdomain", "softmax"): "interdomain is better than softmax",
    ("interdomain", "interdomain_norope"): "RoPE helps interdomain",
    ("s4d", "s4d_rope"): "RoPE harms s4d",
}
LEVEL = 0.05  # of the probability that any verdict of a scale is wrong
_MIN_SEEDS = 3


class Spread(NamedTuple):
    """A mean over seeds and the sample standard deviation, which a single seed does not have."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = np.asarray(list(values))
        return cls(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)

    def show(self, digits: int, sign: str = "") -> str:
        spread = f" ± {self.sd:.{digits}f}" if self.sd else ""
        return f"{self.mean:{sign}.{digits}f}{spread}"


def write_report(
    workdir: Path,
    configs: Mapping[Cell, Config],
    records: Mapping[Cell, Mapping[str, Any]],
    *,
    is_text: bool = True,
    comparisons: Sequence[tuple[str, str]] = (),
) -> str:
    """Writes `report.md`, `report.json` and figures to `workdir`, and returns the text.

    Args:
      workdir: folder of the study.
      configs: all cells of the study with their configs.
      records: those that are done or failed, as of `read_records`; failed ones are listed and count nowhere else.
      is_text: whether validation losses may stand next to the paper's.
      comparisons: of `Study`.
    """
    done = {cell: record for cell, record in records.items() if "error" not in record}
    failed = {str(cell): record["error"] for cell, record in records.items() if cell not in done}
    missing = [str(cell) for cell in configs if cell not in records]
    first = next(iter(done.values()), {})
    conditions = [cell.condition for cell in configs]
    reference = "softmax" if "softmax" in conditions else conditions[0]
    results = {
        "cells": {"all": len(configs), "done": len(done), "failed": failed, "missing": missing},
        "versions": first.get("versions", {}),
        "devices": sorted({record["device"] for record in done.values()}),
        "dates": sorted({record["date"] for record in done.values()}),
        "reference": reference,
        "validation": _validation(configs, done, reference, is_text),
        "orderings": _orderings(done, comparisons) if is_text else [],
        "measured": _measured(configs, done),
    }
    write_atomic(workdir / "report.json", json.dumps(results, indent=1) + "\n")
    figures = draw(workdir, configs, done)
    text = _text(workdir.name, results, figures)
    write_atomic(workdir / "report.md", text + "\n")
    return text


def _validation(
    configs: Mapping[Cell, Config], done: Mapping[Cell, Mapping[str, Any]], reference: str, is_text: bool
) -> list[dict[str, Any]]:
    rows = []
    for (scale, condition), cells in by_condition(done).items():
        config = configs[cells[0]]
        losses = {cell.seed: best_loss(done[cell]) for cell in cells}
        bases = {
            cell.seed: best_loss(done[base]) for cell in cells if (base := cell._replace(condition=reference)) in done
        }
        change = [100 * math.expm1(losses[seed] - base) for seed, base in bases.items()]
        rows.append(
            {
                "scale": scale,
                "condition": condition,
                "parameters": count_parameters(config.model)["total"],
                "state": state_of_layer(config),
                "losses": losses,
                "loss": Spread.of(losses.values()),
                "perplexity": Spread.of(math.exp(loss) for loss in losses.values()),
                "percent against reference": Spread.of(change) if change and condition != reference else None,
                "paper": _paper_perplexity(config) if is_text else "",
            }
        )
    return sorted(rows, key=lambda row: (row["scale"], row["loss"].mean))


def _paper_perplexity(config: Config) -> str:
    """The paper's validation perplexity for a config's mixer, and what it is against softmax."""
    mixer, steps = config.model.mixers[0], config.train.steps
    scale, values = RESULTS["perplexity", "perplexity"]
    if not setting_note("1.3B", config, steps):
        scale, losses = RESULTS["perplexity", "loss"]
        values = {name: math.exp(loss) for name, loss in losses.items()}
    if mixer not in values:
        return ""
    change = 100 * (values[mixer] / values["softmax"] - 1)
    return f"{setting_note(scale, config, steps)}{values[mixer]:.2f} ({change:+.1f} %)"


def _orderings(done: Mapping[Cell, Mapping[str, Any]], comparisons: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every pair of conditions of the paper's table 4, in its order, then `comparisons`: differences in nats, by seed.

    They are negative where the first condition is better.
    """
    _, paper = RESULTS["perplexity", "perplexity"]
    table_4 = [*itertools.combinations(sorted(paper, key=lambda name: paper[name]), 2)]
    rows = []
    for scale in dict.fromkeys(cell.scale for cell in done):
        pairs = []
        for better, worse in (*table_4, *comparisons):
            differences = {
                cell.seed: best_loss(record) - best_loss(done[other])
                for cell, record in done.items()
                if (cell.scale, cell.condition) == (scale, better) and (other := cell._replace(condition=worse)) in done
            }
            if differences:
                pairs.append(
                    {
                        "scale": scale,
                        "conditions": [better, worse],
                        "meaning": MEANINGS.get((better, worse), ""),
                        "differences": differences,
                        "difference": Spread.of(differences.values()),
                        "paper": math.log(paper[better] / paper[worse]) if (better, worse) in table_4 else None,
                        "p": p_value(list(differences.values())),
                    }
                )
        for row, p in zip(pairs, holm([row["p"] for row in pairs]), strict=True):
            as_said = "as said" if row["paper"] is None else "as the paper"
            rows.append(row | {"corrected p": p, "verdict": verdict(row["differences"].values(), p, as_said)})
    return rows


def p_value(differences: Sequence[float]) -> float:
    """Of a two-sided t-test that the mean is 0, exact for normal differences; 1 for a single one."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    if np.ptp(differences) == 0:
        return 0.0
    result: Any = stats.ttest_1samp(differences, 0)  # its type leaves out the attributes
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected so that all of those below a level are right but with a probability of that level (Holm)."""
    order = np.argsort(p_values)
    stepped = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected.tolist()


def verdict(differences: Iterable[float], corrected_p: float, as_said: str = "as the paper") -> str:
    """What differences, which are negative where they agree with an ordering, say of it."""
    differences = list(differences)
    if len(differences) < _MIN_SEEDS:
        return f"{len(differences)} of {_MIN_SEEDS} seeds"
    if corrected_p >= LEVEL:
        return "undecided"
    return as_said if np.mean(differences) < 0 else "reversed"


def _measured(
    configs: Mapping[Cell, Config], done: Mapping[Cell, Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each task for every scale and condition, with the paper's."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for (scale, condition), cells in by_condition(done).items():
        config = configs[cells[0]]
        for task in done[cells[0]]["evaluations"]:
            measured = [done[cell]["evaluations"][task]["metrics"] for cell in cells]
            metrics = {name: Spread.of(one[name] for one in measured) for name in measured[0]}
            row = {"scale": scale, "condition": condition, "seeds": len(cells), "metrics": metrics}
            tables.setdefault(task, []).append(row | {"paper": _paper_results(task, metrics, config)})
    return tables


def _paper_results(task: str, metrics: Iterable[str], config: Config) -> str:
    """The paper's results of a task for a config's mixer: of the same metrics, or else of all that it has."""
    mixer = config.model.mixers[0]
    known = {name: result for (of, name), result in RESULTS.items() if of == task and mixer in result[1]}
    known = {name: result for name, result in known.items() if name in metrics} or known
    known = {name: result for name, result in known.items() if task != "length" or name.startswith("mean")}
    by_scale: dict[str, list[str]] = {}
    for name, (scale, values) in known.items():
        by_scale.setdefault(scale, []).append(f"{values[mixer]:g} ({name})")
    return "; ".join(
        setting_note(scale, config, config.train.steps) + ", ".join(shown) for scale, shown in by_scale.items()
    )


def _text(name: str, results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    cells = results["cells"]
    parts = [
        f"# {name}",
        f"{cells['done']} of {cells['all']} cells. {', '.join(results['dates'])}; {', '.join(results['devices'])}; "
        + ", ".join(f"{package} {version}" for package, version in results["versions"].items())
        + ".",
    ]
    if cells["failed"]:
        lines = (f"* {cell}: `{error.splitlines()[-1]}`" for cell, error in cells["failed"].items())
        parts.append("**Failed, and counted nowhere below:**\n\n" + "\n".join(lines))
    if cells["missing"]:
        parts.append(f"**Not done yet:** {'; '.join(cells['missing'])}.")
    parts += [
        "## Validation",
        f"Best validation loss of each run, mean ± sample standard deviation over seeds; perplexity against "
        f"{results['reference']} seed by seed.",
        _table(
            ("scale", "condition", "parameters", "state a layer", "seeds", "nats per token", "perplexity",
             f"against {results['reference']}, %", "paper: perplexity (against softmax)"),
            results["validation"],
            lambda row: (
                row["scale"], row["condition"], f"{row['parameters']:,}", f"{row['state']:,}", len(row["losses"]),
                row["loss"].show(4), row["perplexity"].show(2),
                row["percent against reference"].show(2, "+") if row["percent against reference"] else "", row["paper"],
            ),
        ),
    ]  # fmt: skip
    if results["orderings"]:
        parts += [
            "## Orderings",
            "All of the paper's table 4, and those that the study adds. Differences in nats per token, seed by seed; "
            "negative is what an ordering says. p is of a paired t-test, corrected (Holm) over all orderings of a "
            f"scale: the chance that any verdict is wrong is {LEVEL}.",
            _table(
                ("scale", "ordering", "difference", "paper, 125M", "p", "corrected", "here"),
                results["orderings"],
                lambda row: (
                    row["scale"],
                    "`{}` < `{}`".format(*row["conditions"]) + (f": {row['meaning']}" if row["meaning"] else ""),
                    row["difference"].show(4, "+"), "" if row["paper"] is None else f"{row['paper']:+.4f}",
                    f"{row['p']:.2g}", f"{row['corrected p']:.2g}", f"**{row['verdict']}**",
                ),
            ),
        ]  # fmt: skip
    for task, rows in results["measured"].items():
        names = list(rows[0]["metrics"])
        parts += [
            f"## {_TITLES.get(task, task)}",
            _table(
                ("scale", "condition", "seeds", *names, "paper"),
                rows,
                lambda row: (
                    row["scale"], row["condition"], row["seeds"],
                    *(spread.show(3) for spread in row["metrics"].values()), row["paper"],
                ),
            ),
        ]  # fmt: skip
    parts += [f"## {title}\n\n![{title}]({file})" for title, file in figures.items()]
    return "\n\n".join(parts)


_TITLES = {
    "perplexity": "Perplexity",
    "length": "Length extrapolation: perplexity in windows of so many tokens",
    "passkey": "Recall: passkey, share found in so many tokens",
    "phonebook": "Recall: phone book of so many entries, share right",
    "mqar": "Recall: MQAR, share right",
}


def _table(head: Sequence[str], rows: Iterable[Any], cells: Callable[[Any], Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
