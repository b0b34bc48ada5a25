"""The figures of a study, each a PNG."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from idattn.config import Config
from idattn.costs import count_parameters
from idattn.files import write_figure
from idattn.study.grid import Cell, best_loss, by_condition, state_of_layer

Records = Mapping[Cell, Mapping[str, Any]]


def draw(folder: Path, configs: Mapping[Cell, Config], done: Records) -> dict[str, str]:
    """Draws what the records of finished cells have, and returns the title of each figure with its file in `folder`."""
    figures = {}
    if done:
        figures["compute.png"] = ("Perplexity against compute", _compute(configs, done))
        figures["seeds.png"] = ("Every seed", _seeds(done))
    if any("length" in record["evaluations"] for record in done.values()):
        figures["length.png"] = ("Beyond the training context", _lengths(configs, done))
    recalled = {cell: record for cell, record in done.items() if "mqar" in record["evaluations"]}
    scales = Counter(condition for _, condition in by_condition(recalled))
    if recalled := {cell: record for cell, record in recalled.items() if scales[cell.condition] > 1}:
        figures["recall.png"] = ("Recall by the size of the state", _recall(configs, recalled))
    for file, (_, figure) in figures.items():
        write_figure(folder / file, figure)
    return {title: file for file, (title, _) in figures.items()}


def _colours(done: Records) -> dict[str, str]:
    """A colour for each condition, of up to 20."""
    conditions = dict.fromkeys(cell.condition for cell in done)
    palette = color_sequences["tab10" if len(conditions) <= 10 else "tab20"]
    return {name: to_hex(palette[n % len(palette)]) for n, name in enumerate(conditions)}


def _compute(configs: Mapping[Cell, Config], done: Records) -> Figure:
    """Validation perplexity against 6 N D, as the paper's figure 2: dotted during training, a marker at the end."""
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="compute 6 N D, FLOPs", ylabel="validation perplexity", xscale="log", yscale="log")
    for condition, colour in _colours(done).items():
        ends = []
        for (_, name), cells in by_condition(done).items():
            if name == condition:
                config = configs[cells[0]]
                steps, losses = np.mean([done[cell]["curve"] for cell in cells], axis=0).T
                flops = (
                    6 * count_parameters(config.model)["total"] * config.train.batch_size * config.data.seq_len * steps
                )
                axes.plot(flops, np.exp(losses), color=colour, linestyle=":", linewidth=1)
                ends.append((flops[-1], np.exp(np.mean([best_loss(done[cell]) for cell in cells]))))
        axes.plot(*zip(*ends, strict=True), color=colour, marker="o", label=condition)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def _seeds(done: Records) -> Figure:
    """The loss of every run, and the mean of each condition, best first."""
    scales = list(dict.fromkeys(cell.scale for cell in done))
    figure = Figure(figsize=(7, 3.4 * len(scales)), dpi=110, layout="constrained")
    colours = _colours(done)
    for scale, axes in zip(scales, figure.subplots(len(scales), squeeze=False)[:, 0], strict=True):
        losses = {
            name: [best_loss(done[cell]) for cell in cells]
            for (at, name), cells in by_condition(done).items()
            if at == scale
        }
        order = sorted(losses, key=lambda name: -np.mean(losses[name]))
        for row, name in enumerate(order):
            axes.plot(losses[name], [row] * len(losses[name]), "o", color=colours[name], alpha=0.6)
            axes.plot(np.mean(losses[name]), row, "|", color="black", markersize=18)
        axes.set_yticks(range(len(order)), labels=order)
        axes.set(title=scale, xlabel="validation loss, nats per token")
        axes.grid(alpha=0.3)
    return figure


def _recall(configs: Mapping[Cell, Config], done: Records) -> Figure:
    """MQAR, the share right in the shortest rows against the numbers in a layer's state: seeds, and their means."""
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="numbers in the state of a layer", ylabel="share right", xscale="log")
    for condition, colour in _colours(done).items():
        shares: dict[int, list[float]] = {}
        for cell, record in done.items():
            if cell.condition == condition:
                share = next(iter(record["evaluations"]["mqar"]["metrics"].values()))
                shares.setdefault(state_of_layer(configs[cell]), []).append(share)
        for size, seeds in shares.items():
            axes.plot([size] * len(seeds), seeds, "o", color=colour, alpha=0.3, markersize=4)
        sizes = sorted(shares)
        axes.plot(sizes, [np.mean(shares[size]) for size in sizes], color=colour, marker="o", label=condition)
    sizes = sorted({state_of_layer(configs[cell]) for cell in done})
    axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _lengths(configs: Mapping[Cell, Config], done: Records) -> Figure:
    """Perplexity against the length of the windows, and loss by position in the longest; means of corpora and seeds."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    by_length, by_position = figure.subplots(1, 2)
    colours = _colours(done)
    several = len({cell.scale for cell in done}) > 1
    for (scale, condition), cells in by_condition(done).items():
        corpora = [
            corpus
            for cell in cells
            for corpus in done[cell]["evaluations"].get("length", {"corpora": {}})["corpora"].values()
        ]
        if corpora:
            label = f"{condition}, {scale}" if several else condition
            _length_curves(by_length, by_position, corpora, dict(color=colours[condition], label=label))
    for axes in (by_length, by_position):
        axes.axvline(next(iter(configs.values())).data.seq_len, color="gray", linestyle=":", label="trained on")
        axes.grid(alpha=0.3)
    by_length.set(xlabel="tokens in a window", ylabel="perplexity", xscale="log")
    by_position.set(xlabel="position in the longest window", ylabel="nats per token")
    by_length.legend(fontsize=8)
    return figure


def _length_curves(
    by_length: Axes, by_position: Axes, corpora: Sequence[Mapping[str, Mapping[str, Any]]], style: Mapping[str, Any]
) -> None:
    lengths = sorted(map(int, corpora[0]))
    means = [np.mean([corpus[str(length)]["perplexity"] for corpus in corpora]) for length in lengths]
    by_length.plot(lengths, means, marker="o", **style)
    by_length.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    by_length.set_xticks([], minor=True)
    longest = [corpus[str(lengths[-1])] for corpus in corpora]
    by_position.plot(longest[0]["positions"], np.mean([one["by_position"] for one in longest], axis=0), **style)
