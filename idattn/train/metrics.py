"""What a run reports: scalars in a JSONL file and TensorBoard, and a plot of the losses."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from etils import epath
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from idattn.files import resolve_path, write_atomic, write_figure
from idattn.train.storage import LocalFolder
from idattn.train.trackers import Tracker


class MetricsWriter:
    """Writes scalars to `workdir/metrics.jsonl` and `workdir/tensorboard`; a context manager, for one process.

    It hands them to its `trackers` too, a list to append to, and closes these. There and in TensorBoard the names are
    grouped: `val/loss` is the file's `val_loss`, `train/loss` its `loss`, and so on.

    Args:
      workdir: folder of the run. On a disk each line is there at once, in a bucket after `upload` and at the end.
      resume_step: step of the restored checkpoint; what was written for later steps is dropped. -1 for a new run.

    Raises:
      ValueError: a line of `metrics.jsonl` other than a half-written last one is no JSON object with a step.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int):
        self.trackers: list[Tracker] = []
        workdir = resolve_path(workdir)
        stored = workdir / "metrics.jsonl"
        earlier = [row for row in read_metrics(stored) if row["step"] <= resume_step] if stored.exists() else []
        self._local = LocalFolder(workdir)
        path = self._local.path / "metrics.jsonl"
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in earlier))
        self._file = path.open("a")
        # tensorboardX's writer for buckets ends at a fault of the network, and calls of the run then wait for ever. It
        # names a file by the second: two starts within one would write the same file, so a number follows, which also
        # gives the files, that TensorBoard reads by name, the order of the starts.
        events = workdir / "tensorboard"
        number = len(list(events.iterdir())) if events.exists() else 0
        self._tensorboard = SummaryWriter(
            str(path.parent / "tensorboard"), purge_step=resume_step + 1, filename_suffix=f".{number:06}"
        )
        self.upload()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with ExitStack() as stack:  # every one of these runs, whatever another raises
            for tracker in self.trackers:
                stack.callback(tracker.close, kind is not None)
            stack.callback(self._local.close)
            stack.callback(self._tensorboard.close)
            stack.callback(self._file.close)

    def upload(self) -> None:
        """Have a bucket show what was written; call it before a checkpoint, since a resume writes later steps alone."""
        self._tensorboard.flush()
        self._local.upload()

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append one line; in the file, values that are not finite are null, for which JSON has no number.

        Args:
          step: optimiser steps done.
          scalars: values by name, each a number or an array of one.
        """
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
        self._file.flush()
        tags = {name: f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}" for name in values}
        grouped = {tags[name]: value for name, value in values.items()}
        for tag, value in grouped.items():
            self._tensorboard.add_scalar(tag, value, step)
        for tracker in self.trackers:
            tracker.write(int(step), grouped)


def plot_losses(workdir: epath.PathLike, baselines: Mapping[str, float] | None = None) -> epath.Path:
    """Draw the training and validation losses of `workdir/metrics.jsonl` to `workdir/loss.png`.

    Args:
      workdir: folder of the run.
      baselines: losses to draw as horizontal lines, by name, in nats per token.

    Returns:
      Path of the image.

    Raises:
      FileNotFoundError: the run has no metrics.
      ValueError: the metrics hold no loss, or a line of them is malformed.
    """
    path = resolve_path(workdir) / "metrics.jsonl"
    records = read_metrics(path)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="loss (nats per token)")
    styles: dict[str, dict[str, Any]] = {
        "loss": dict(label="training", color="tab:blue", linewidth=1),
        "val_loss": dict(label="validation", color="tab:orange", marker="o", markersize=4),
    }
    for key, style in styles.items():
        points = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if not axes.lines:
        raise ValueError(f"{path} has neither 'loss' nor 'val_loss'; there is nothing to plot.")
    for index, (name, loss) in enumerate((baselines or {}).items()):
        axes.axhline(loss, label=f"{name} ({loss:.3g})", color=f"C{index + 2}", linewidth=1, linestyle="--")
    axes.grid(alpha=0.3)
    axes.legend()
    image = path.with_name("loss.png")
    write_figure(image, figure)
    return image


def read_metrics(path: Path | epath.Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; a half-written last line is left out."""
    *lines, _half_written = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
            records[-1]["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no JSON object with a step: {line[:80]!r}. Remove the line."
            ) from error
    return records
