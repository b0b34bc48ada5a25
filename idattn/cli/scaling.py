"""Plan runs over slices of TPUs that are not there: a table and a plot of what fits, what moves, how fast.

idattn scaling --out=docs/scaling

For each model, slice and context, the table has the fastest plan that fits, as `idattn plan` searches it. A step has
524,288 tokens, or one row where that is longer. Every figure is from a train step that the TPU's compiler compiled, so
a row takes some minutes. Each row is added to OUT.json at once; rows that are there are not compiled again.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from absl import flags
from etils import epath
from matplotlib.figure import Figure
from tqdm import tqdm

from idattn.choices import check_choice
from idattn.config import from_config_dict
from idattn.config_files import load_config
from idattn.files import read_json, resolve_path, write_atomic, write_figure
from idattn.plan.compiler import load_compiler
from idattn.plan.search import fastest_that_fits

FLAGS = flags.FLAGS
STEP = 524_288  # tokens
SLICES = {  # chips
    "v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256,
    "v5p:2x2x1": 4, "v5p:4x4x4": 64, "v5p:8x8x8": 512,
    "v6e:2x2": 4, "v6e:8x8": 64, "v6e:16x16": 256,
}  # fmt: skip
LONG = ("v5e:16x16", "v5p:4x4x4")
CASES = [
    *((scale, name, 4096) for scale in ("1.3B", "7B") for name in SLICES),
    *((scale, name, T) for scale in ("1.3B", "7B") for name in LONG for T in (2**15, 2**18, 2**20)),
]
MODELS, _, CONTEXTS = VALUES = [list(dict.fromkeys(map(str, column))) for column in zip(*CASES, strict=True)]
COLUMNS = (
    "model",
    "slice",
    "context",
    "mesh",
    "recomputed",
    "parts",
    "GiB a chip",
    "sent, GB",
    "predicted, ms",
    "MFU",
    "at least, ms",
    "MFU at most",
)


def define_flags() -> None:
    flags.DEFINE_string("out", "runs/scaling", "Path of the figures, to which .json, .md and .png are added.")
    flags.DEFINE_list("models", MODELS, f"Scales of the config paper: any of {', '.join(MODELS)}.")
    flags.DEFINE_list("slices", list(SLICES), "TPU slices, any of the default's.")
    flags.DEFINE_list(
        "contexts", CONTEXTS, f"Tokens in a row, any of the default's; above 4096 on {' and '.join(LONG)} alone."
    )


def plan(scale: str, name: str, seq_len: int) -> dict[str, Any]:
    """The figures of the fastest plan that fits, or of the last one that does not."""
    config = from_config_dict(load_config(f"paper:{scale},interdomain"))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=seq_len),
        train=dataclasses.replace(config.train, batch_size=max(1, STEP // seq_len)),
    )
    planned, figures = fastest_that_fits(config, name, SLICES[name])
    how = {"remat": planned.compute.remat, "accumulation": planned.train.accumulation}
    return {"scale": scale, "slice": name, "context": seq_len} | how | figures


def row(figures: dict[str, Any]) -> list[str]:
    """A row of the table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    cells = [figures["scale"], figures["slice"], f"{figures['context']:,}", mesh]
    if not figures["fits"]:
        needed = f"**{figures['needed_gib']:.0f} of {figures['hbm_gib']}: does not fit**"
        return [*cells, figures["remat"], str(figures["accumulation"]), needed, *[""] * 5]
    memory = f"{figures['peak_gib']:.1f} of {figures['hbm_gib']}"
    sent, step = sum(figures["sent_bytes"].values()) / 1e9, max(figures["seconds"].values()) * 1e3
    how = [figures["remat"], str(figures["accumulation"])]
    predicted = figures.get("predicted")  # not in files of older versions
    prediction = [f"{predicted['seconds'] * 1e3:,.0f}", f"{predicted['mfu']:.0%}"] if predicted else ["", ""]
    return [*cells, *how, memory, f"{sent:.1f}", *prediction, f"{step:,.0f}", f"{figures['mfu_at_most']:.0%}"]


def table(plans: list[dict[str, Any]]) -> str:
    """All rows in markdown."""
    lines = [COLUMNS, ["---"] * 2 + ["---:", "---"] + ["---", *["---:"] * 7], *map(row, plans)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(plans: list[dict[str, Any]], path: epath.Path) -> None:
    """Tokens a second as predicted, and at most: against chips at 4,096 tokens a row, and of a chip by context."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    by_chips, by_context = figure.subplots(1, 2)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figures in (f for f in plans if "predicted" in f):  # those that fit, of this version
        groups.setdefault((figures["scale"], figures["slice"][:3]), []).append(figures)
    for (scale, chip), rows in groups.items():
        style = dict(marker="o", color=f"C{['v5e', 'v5p', 'v6e'].index(chip)}")
        style["linestyle"] = "-" if scale == "1.3B" else "--"
        short = [r for r in rows if r["context"] == 4096]
        _lines(by_chips, short, "chips", lambda r: 1, style | {"label": f"{scale} on {chip}"})
        long = [r for r in rows if r["slice"] in LONG]
        if len({r["context"] for r in long}) > 1:
            _lines(
                by_context, long, "context", lambda r: r["chips"], style | {"label": f"{scale} on {long[0]['slice']}"}
            )
    by_chips.set(xlabel="chips", ylabel="tokens a second", title="4,096 tokens a row")
    by_context.set(xlabel="tokens a row", ylabel="tokens a second and chip", title="long rows")
    for axes in (by_chips, by_context):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle(
        "By the compiler's estimates of compiled programs; pale: bounds by published peaks. Nothing was run",
        fontsize=10,
    )
    write_figure(path, figure)


def _lines(axes: Any, plans: list[dict[str, Any]], x: str, share: Callable[[dict[str, Any]], int], style: Any) -> None:
    """The tokens a second of plans over one of their figures, and what published peaks allow."""
    plans = sorted(plans, key=lambda f: f[x])
    tokens = [max(STEP, f["context"]) / share(f) for f in plans]
    predicted = [n / f["predicted"]["seconds"] for n, f in zip(tokens, plans, strict=True)]
    most = [n / max(f["seconds"].values()) for n, f in zip(tokens, plans, strict=True)]
    axes.loglog([f[x] for f in plans], predicted, **style)
    axes.loglog([f[x] for f in plans], most, **style | {"label": None, "alpha": 0.25})


def wanted_cases() -> list[tuple[str, str, int]]:
    """The cases that the flags name.

    Raises:
      ValueError: no case has a value, or none has what the flags have together.
    """
    given = FLAGS.models, FLAGS.slices, FLAGS.contexts
    for name, values, known in zip(("--models", "--slices", "--contexts"), given, VALUES, strict=True):
        for value in values:
            check_choice(name, value, known)
    wanted = [case for case in CASES if all(str(x) in values for x, values in zip(case, given, strict=True))]
    if not wanted:
        raise ValueError(
            f"no model is planned on --slices={','.join(FLAGS.slices)} with --contexts={','.join(FLAGS.contexts)}: "
            f"contexts above 4096 need a slice of {', '.join(LONG)}."
        )
    return wanted


def main(_):
    out, wanted = resolve_path(FLAGS.out), wanted_cases()
    load_compiler()
    file = out.with_suffix(".json")
    plans = read_json(file, "Delete it to plan anew.", list) if file.exists() else []
    for case in tqdm(wanted):
        if case in [(f["scale"], f["slice"], f["context"]) for f in plans]:
            continue
        plans.append(plan(*case))
        tqdm.write(" | ".join(row(plans[-1])))
        plans.sort(key=lambda f: CASES.index((f["scale"], f["slice"], f["context"])))
        write_atomic(file, json.dumps(plans, indent=1))
        write_atomic(out.with_suffix(".md"), table(plans) + "\n")
        plot(plans, out.with_suffix(".png"))
