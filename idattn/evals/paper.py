"""The paper's results (arXiv 2605.24330, tables 2, 4, 6 to 9), to compare with those of other models."""

from typing import Any

from idattn.choices import CELLS
from idattn.config import Config

# Model width, layers and training tokens of the scales that results are given for.
_SCALES = {"125M": (768, 12, 2.5e9), "1.3B": (2048, 24, 26e9)}
_COLUMNS = ("task", "metric", "here", "paper")
_MIXERS = ("softmax", "interdomain", "s4d")
_LENGTHS = (4096, 8192, 14336)
_CORPORA = {
    "mean": ((12.79, 20.54, 55.92), (14.36, 14.14, 14.26), (27.24, 26.89, 26.75)),
    "pg19": ((16.34, 26.78, 70.95), (15.86, 15.73, 15.94), (19.96, 19.75, 19.66)),
    "codeparrot": ((12.13, 22.23, 74.85), (17.62, 17.31, 17.48), (53.10, 52.44, 52.16)),
    "govreport": ((7.33, 12.20, 31.76), (7.36, 7.27, 7.29), (9.19, 9.07, 9.01)),
    "narrativeqa": ((21.28, 34.36, 92.75), (22.85, 22.67, 22.99), (36.83, 36.42, 36.26)),
    "qasper": ((14.43, 22.94, 60.08), (15.75, 15.52, 15.63), (23.53, 23.22, 23.13)),
    "qmsum": ((13.74, 18.57, 41.96), (15.20, 14.88, 14.94), (30.44, 29.97, 29.80)),
}
_LARGE = {  # at 1.3B, one value for each of _MIXERS; shares are of 1
    ("perplexity", "loss"): (2.155, 2.077, 2.212),
    ("lambada_openai", "acc"): (0.3943, 0.4436, 0.2564),
    ("lambada_openai", "perplexity"): (21.03, 14.76, 41.02),
    ("wikitext", "word_perplexity"): (20.55, 19.77, 25.27),
    ("wikitext", "bits_per_byte"): (0.8156, 0.8051, 0.8713),
    ("piqa", "acc"): (0.6942, 0.7138, 0.7100),
    ("hellaswag", "acc_norm"): (0.4853, 0.5427, 0.4934),
    ("winogrande", "acc"): (0.5422, 0.5785, 0.5383),
    ("arc_easy", "acc"): (0.6587, 0.6991, 0.6086),
    ("arc_challenge", "acc_norm"): (0.3302, 0.3746, 0.3336),
    ("social_iqa", "acc"): (0.4028, 0.4145, 0.4110),
    ("boolq", "acc"): (0.6128, 0.5963, 0.6037),
    ("commonsense", "mean"): (0.5151, 0.5454, 0.4944),
    ("longbench14", "mean"): (0.1240, 0.1229, 0.0857),
    ("swde", "contains"): (0.6058, 0.1746, 0.0657),
    ("fda", "contains"): (0.5045, 0.0953, 0.0036),
    ("squad_completion", "contains"): (0.1133, 0.3378, 0.1491),
    ("passkey", "1024"): (0.995, 0.655, 0.0),
    ("passkey", "2048"): (1.0, 0.28, 0.0),
    ("passkey", "4096"): (0.89, 0.095, 0.0),
    ("passkey", "8192"): (0.0, 0.035, 0.0),
    ("phonebook", "16"): (0.545, 0.0, 0.0),
    ("phonebook", "32"): (0.52, 0.0, 0.0),
    ("phonebook", "64"): (0.455, 0.0, 0.0),
    ("phonebook", "128"): (0.24, 0.0, 0.0),
}
_WINDOW = 4096  # tokens that its rows of lm-eval were cut to, its trained length: softmax's WikiText-2 tells
# Versions of lm-eval's tasks before the changes that make their results incomparable; lm-eval 0.4.13 has version 1.
_VERSIONS = {"swde": 0, "fda": 0, "squad_completion": 0}
RESULTS: dict[tuple[str, str], tuple[str, dict[str, float]]] = {
    **{key: ("1.3B", dict(zip(_MIXERS, values, strict=True))) for key, values in _LARGE.items()},
    **{
        ("length", f"{corpus} {length}"): ("1.3B", {mixer: row[n] for mixer, row in zip(_MIXERS, rows, strict=True)})
        for corpus, rows in _CORPORA.items()
        for n, length in enumerate(_LENGTHS)
    },
    ("perplexity", "perplexity"): (
        "125M",
        dict(zip(CELLS, (16.48, 16.51, 16.65, 16.94, 19.22, 19.77, 20.18), strict=True)),
    ),
}
"""Of a task and metric the scale of the paper's model, and its result for each mixer."""


def setting_note(scale: str, config: Config, step: int, *, local: bool = False) -> str:
    """What to write before the paper's results at a scale, next to those of a checkpoint: "" in the same setting.

    The setting is the same where width, depth, vocabulary (32,000), context (4,096) and training tokens (to 1 %) are,
    and the questions are not `local`: rows of local files, which may be others than lm-eval's, or ask otherwise, or of
    a version of the task that cannot be compared, or read in other windows. The text that was trained and evaluated on
    is for the reader to compare.
    """
    width, depth, tokens = _SCALES[scale]
    model = config.model
    seen = step * config.train.batch_size * config.data.seq_len
    same = (model.model_dim, model.num_layers, model.vocab_size, config.data.seq_len) == (width, depth, 32_000, 4096)
    return "" if same and not local and abs(seen / tokens - 1) < 0.01 else f"other setting ({scale}): "


def paper_values(task: str, metric: str, config: Config, step: int, *, local: bool = False) -> str:
    """The paper's results for a metric of a checkpoint, with their `setting_note`; "" where it has none."""
    if (task, metric) not in RESULTS:
        return ""
    scale, values = RESULTS[task, metric]
    note = setting_note(scale, config, step, local=local)
    return note + ", ".join(f"{name} {value:g}" for name, value in values.items())


def table(results: dict[str, Any], config: Config) -> str:
    """All metrics in markdown, shares with their standard errors."""
    lines = [_COLUMNS, ("---", "---", "---:", "---")]
    for task, result in results["tasks"].items():
        for metric, value in result["metrics"].items():
            # Within a list, and for a single task, the metric's name begins with the task's.
            name, _, rest = metric.rpartition(" ")
            of = name or task
            versions = result.get("versions", {})  # of lm-eval and its tasks
            other = (of in _VERSIONS and versions.get(of) != _VERSIONS[of]) or (
                bool(versions) and result.get("window") != _WINDOW
            )
            setting: Any = dict(config=config, step=results["step"], local=result.get("local", False) or other)
            paper = paper_values(task, metric, **setting) or paper_values(name, rest, **setting)
            error = result.get("errors", {}).get(metric)
            lines.append((task, metric, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"), paper))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
