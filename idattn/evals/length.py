"""Loss at context lengths beyond training: the same text in windows of each length, and by position in the window.

A window is L consecutive tokens of the stream of a corpus, its documents one after another with BOS before each, read
from an empty state and without resets; all of its tokens but the first are predicted. Every length reads the same
tokens, but for less than a window at the end.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from idattn.data import TokenStream
from idattn.evals.scores import batch_rows, score_rows
from idattn.files import write_figure
from idattn.inference import Decoder

_BINS = 64  # of positions in a curve


def corpus_paths(corpora: Iterable[str]) -> dict[str, str]:
    """The sources of corpora by name.

    Args:
      corpora: each NAME=SOURCE, or SOURCE alone, whose name is that of its file up to the first dot. What exists as a
        file or folder is a SOURCE; a NAME has no "/".

    Raises:
      ValueError: two have one name, or one has the name of the mean.
    """
    paths: dict[str, str] = {}
    for corpus in corpora:
        name, equals, path = corpus.partition("=")
        if not equals or "/" in name or Path(corpus).exists():
            name, path = Path(corpus).name.split(".")[0], corpus
        if name in ("", "mean", *paths):
            reason = f"as is {paths[name]}" if name in paths else "which no corpus can have"
            raise ValueError(f"corpus {path} is named {name!r}, {reason}; give it another name, as NAME={path}.")
        paths[name] = path
    return paths


def length_losses(
    decoder: Decoder,
    stream: np.ndarray | TokenStream,
    lengths: Sequence[int],
    *,
    num_tokens: int,
    batch_tokens: int,
    name: str = "corpus",
) -> dict[int, dict[str, Any]]:
    """The loss in windows of each length.

    Args:
      decoder: the model.
      stream: (tokens,) of a corpus.
      lengths: L of each, at least 2 tokens.
      num_tokens: how many to read of the stream, from its beginning, and at least a window of the greatest length.
      batch_tokens: of the windows that are read together, at least one window.
      name: of the corpus, for the error and the progress bar.

    Returns:
      For each length `loss` in nats per token, `perplexity`, `windows`, and the curve `positions` and `by_position`:
      the last position of up to 64 bins of like width, counted from 0, and the mean loss of the tokens there.

    Raises:
      ValueError: a length is below 2, or the stream is shorter than one.
    """
    if min(lengths) < 2 or max(lengths) > len(stream):
        raise ValueError(
            f"lengths={list(lengths)} must be at least 2 tokens, and at most the {len(stream)} tokens that {name} has."
        )
    tokens = np.asarray(stream[: max(num_tokens, max(lengths))]).astype(np.int32)
    results = {}
    for length in lengths:
        windows = tokens[: len(tokens) // length * length].reshape(-1, length)
        scores = score_rows(decoder, windows, batch_rows(batch_tokens, length), f"{name}, {length}")
        nats = -np.stack([log_probs for log_probs, _ in scores]).mean(axis=0, dtype=np.float64)  # (L,), the first is 0
        bins = np.array_split(np.arange(1, length), min(_BINS, length - 1))
        loss = float(nats[1:].mean())
        results[length] = {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "windows": len(windows),
            "positions": [int(part[-1]) for part in bins],
            "by_position": [float(nats[part].mean()) for part in bins],
        }
    return results


def mean_perplexities(corpora: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[int, float]:
    """The arithmetic mean over corpora of the perplexity at each length, as in the paper's table 2."""
    lengths = next(iter(corpora.values()))
    return {length: float(np.mean([each[length]["perplexity"] for each in corpora.values()])) for length in lengths}


def plot_lengths(corpora: Mapping[str, Mapping[int, Mapping[str, Any]]], trained_length: int, path: epath.Path) -> None:
    """Perplexity against the length of the windows, and loss by position in the longest; a PNG."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    by_length, by_position = figure.subplots(1, 2)
    for name, results in corpora.items():
        by_length.plot(list(results), [x["perplexity"] for x in results.values()], marker="o", label=name)
        longest = results[max(results)]
        by_position.plot(longest["positions"], longest["by_position"], label=name)
    by_length.set(xlabel="tokens in a window", ylabel="perplexity", xscale="log")
    lengths = list(next(iter(corpora.values())))
    by_length.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    by_length.set_xticks([], minor=True)
    by_position.set(xlabel="position in the longest window", ylabel="nats per token")
    for axes in (by_length, by_position):
        axes.axvline(trained_length, color="gray", linestyle=":", label="trained on")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write_figure(path, figure)
