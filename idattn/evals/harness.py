"""The model in lm-evaluation-harness: its tasks, the paper's lists of them, and the eight tasks from local files.

One BOS is put before every context. Rows longer than a window are cut as lm-evaluation-harness cuts them: what is
scored or continued keeps its last tokens, and a text whose perplexity is asked for is read in windows.
"""

import importlib.metadata
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idattn.data import Tokenizer, optional
from idattn.evals.scores import batch_rows, continue_texts, score_rows, share_error
from idattn.files import read_json_lines, resolve_path
from idattn.inference import Decoder
from idattn.inference.text import encode_prompt

LISTS = {
    "commonsense": (
        "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa", "boolq",
    ),
    "based_recall": ("swde", "fda", "squad_completion"),
    "longbench14": tuple(
        f"longbench_{name}"
        for name in (
            "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum",
            "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p",
        )
    ),
}  # fmt: skip
"""The paper's lists. Of Based's recall suite, those that lm-eval has: without NQ, TriviaQA and DROP in Based's form."""

_NORMALISED = ("hellaswag", "arc_challenge")  # reported by acc_norm
_ANSWER = {"piqa": "Answer:", "arc_easy": "\nAnswer:", "arc_challenge": "\nAnswer:", "boolq": "\nAnswer:"}
_LOCAL = "_local"  # under the same name lm-eval would take its built-in task
_SHARES = ("acc", "acc_norm", "contains")  # metrics that are right or wrong for each row
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Measured(NamedTuple):
    """What lm-eval measured with a task.

    Attributes:
      metrics: the value of each metric.
      errors: standard errors of those that are shares of the rows.
      version: of the task in lm-eval; results of two versions are not comparable. None for local rows.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    version: float | str | None


def make_lm(decoder: Decoder, tokenizer: Tokenizer, batch_tokens: int, window: int | None = None) -> Any:
    """An `lm_eval.api.model.LM` of the model.

    Args:
      decoder: the model.
      tokenizer: of the model.
      batch_tokens: of the rows that are read together, at least one row.
      window: the most tokens that are read of a row; None for rows that are read whole, however long.

    Raises:
      ImportError: lm-eval is missing.
    """
    api = optional.load("lm_eval.api.model", "lm-evaluation-harness", "eval")
    longest = window or sys.maxsize

    def encode(text: str) -> np.ndarray:
        return encode_prompt(tokenizer, text)

    def batch_size(rows: Sequence[np.ndarray]) -> int:
        return batch_rows(batch_tokens, max(map(len, rows)))

    def score(rows: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        return score_rows(decoder, rows, batch_size(rows))

    def cut_prompt(prompt: str, num_tokens: int) -> str:
        """The end of a prompt after which a window has room for so many tokens."""
        row = encode(prompt)
        if len(row) + num_tokens <= longest:
            return prompt
        if num_tokens + 1 >= longest:
            raise ValueError(f"{num_tokens} tokens to write leave no room in a window of {window}; use a longer one.")
        return tokenizer.decode(row[1:][len(row) + num_tokens - longest :])  # without BOS, which is put before it

    class Adapter(api.LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            rows, starts = [], []
            for context, continuation in (request.args for request in requests):
                row = encode(context + continuation)
                # Spaces between the two belong to the continuation, whose first token begins with one. A token may also
                # join the end of the context with the continuation: what is scored starts where the tokens of both
                # differ from those of the context alone.
                start = _common_prefix(row, encode(context.rstrip()))
                if continuation and start == len(row):
                    raise ValueError(
                        f"continuation {continuation!r} of {context[-40:]!r} has no token to score: the "
                        "tokenizer drops it. Leave out the row, or use a tokenizer that encodes spaces."
                    )
                if len(row) - start > longest:
                    raise ValueError(
                        f"continuation {continuation[:40]!r} of {len(row) - start} tokens is longer than a window of "
                        f"{window}; use a longer one."
                    )
                cut = max(len(row) - longest - 1, 0)  # what comes before the window's first token to be read
                rows.append(row[cut:])
                starts.append(start - cut)
            return [
                (float(log_probs[start:].sum(dtype=np.float64)), bool(is_best[start:].all()))
                for start, (log_probs, is_best) in zip(starts, score(rows), strict=True)
            ]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [encode(text) for (text,) in (request.args for request in requests)]
            parts = [(n, *part) for n, row in enumerate(texts) for part in rolling_windows(row, longest)]
            sums = np.zeros(len(texts))
            for (n, _, start), (log_probs, _) in zip(parts, score([row for _, row, _ in parts]), strict=True):
                sums[n] += log_probs[start:].sum(dtype=np.float64)
            return sums.tolist()

        def generate_until(self, requests: list[Any]) -> list[str]:
            alike = defaultdict(list)
            for number, (_, settings) in enumerate(request.args for request in requests):
                alike[json.dumps(settings, sort_keys=True)].append(number)
            written = [""] * len(requests)
            for settings, numbers in alike.items():
                options = _options(json.loads(settings))
                prompts = [cut_prompt(requests[n].args[0], options["num_tokens"]) for n in numbers]
                size = batch_size([encode(prompt) for prompt in prompts])
                texts = continue_texts(
                    decoder, tokenizer, prompts, batch_size=size, stop_tokens=(tokenizer.bos_id,), **options
                )
                for n, text in zip(numbers, texts, strict=True):
                    written[n] = text
            return written

    return Adapter()


def rolling_windows(row: np.ndarray, window: int) -> list[tuple[np.ndarray, int]]:
    """A row in windows, every token but the first scored once, as lm-evaluation-harness divides it.

    Args:
      row: (n,) ids, BOS first.
      window: tokens that are read for each; each window but the last begins with the last one of the window before. The
        last one has as many as the others, most of them scored before, if the row is that long.

    Returns:
      For each the ids, up to window + 1, and the index among them from which on they are scored.
    """
    windows = []
    for first in range(1, max(len(row), 2), window):
        end = min(first + window, len(row))
        begin = max(end - 1 - window, 0)
        windows.append((row[begin:end], first - begin))
    return windows


def _common_prefix(row: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two rows have in common at their beginning."""
    same = min(len(row), len(other))
    return int(np.argmin([*(row[:same] == other[:same]), False]))


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """The options of `continue_texts` for the generation settings of a task."""
    known = ("until", "max_gen_toks", "do_sample", *_SAMPLING)
    if unknown := settings.keys() - {*known}:
        raise ValueError(f"generation settings {sorted(unknown)} are not known; they must be of {', '.join(known)}.")
    until = settings.get("until") or []
    options: dict[str, Any] = {name: settings[name] for name in _SAMPLING if name in settings}
    if not settings.get("do_sample"):
        options["temperature"] = 0.0
    return options | {
        "num_tokens": settings.get("max_gen_toks", 256),
        "stop": [until] if isinstance(until, str) else until,
    }


def task_names() -> list[str]:
    """The names of lm-eval's tasks and groups; none where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return []
    return list(optional.load("lm_eval.tasks", "lm-evaluation-harness", "eval").TaskManager().all_tasks)


def evaluate(
    lm: Any, tasks: Sequence[str], data: str | Path | None = None, limit: int | None = None
) -> dict[str, Measured]:
    """The metrics of tasks of lm-eval, without examples in the prompts.

    Args:
      lm: of `make_lm`.
      tasks: names of lm-eval's.
      data: JSONL file (or `.jsonl.xz`), or folder of such files, that the eight tasks are read from; see `local_task`.
      limit: rows of each task; None for all.

    Returns:
      What was measured by task, or by the tasks of a group.

    Raises:
      ImportError: lm-eval is missing.
      ValueError: `data` has no rows for a task.
    """
    evaluator = optional.load("lm_eval", "lm-evaluation-harness", "eval")
    wanted = [local_task(name, data) for name in tasks] if data else list(tasks)
    # Without the index of lm-eval's built-in tasks, which takes seconds to read.
    manager = optional.load("lm_eval.tasks", "lm-evaluation-harness", "eval").TaskManager(include_defaults=not data)
    output = evaluator.simple_evaluate(
        lm, tasks=wanted, task_manager=manager, num_fewshot=0, limit=limit, bootstrap_iters=0, log_samples=False
    )
    measured = {}
    for name, values in output["results"].items():
        metrics = {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if "," in metric and "_stderr" not in metric and isinstance(value, int | float)
        }
        count = output["n-samples"].get(name, {"effective": 0})["effective"]  # of a group only its tasks have it
        errors = {metric: share_error(metrics[metric], count) for metric in _SHARES if metric in metrics and count > 1}
        version = None if name.endswith(_LOCAL) else output["versions"].get(name)
        measured[name.removesuffix(_LOCAL)] = Measured(metrics, errors, version)
    return measured


def package_version() -> str:
    """The version of lm-eval."""
    return importlib.metadata.version("lm_eval")


def main_metric(task: str, values: dict[str, float]) -> float:
    """The metric that the paper averages: acc_norm for HellaSwag and ARC-challenge, else acc, contains or score."""
    names = ("acc_norm",) if task in _NORMALISED else ("acc", "contains", "score")
    return next(values[name] for name in names if name in values)


def local_task(name: str, data: str | Path) -> dict[str, Any]:
    """The config of one of the eight tasks over local rows, with lm-eval's metrics.

    Rows are objects with `task`, and `query`, `choices` and `gold`; or `context_options`, `continuation` and `gold`
    (WinoGrande); or `context` and `continuation` (LAMBADA). `social_iqa` may be called `siqa`. The
    prompt is the query, ended by "Answer:" as lm-eval has it; a query that is worded or offers choices otherwise than
    lm-eval's makes another task.

    Raises:
      ValueError: `name` is none of the eight, or has no rows.
    """
    if name not in LISTS["commonsense"]:
        raise ValueError(f"task={name!r} is not read from local data, only {', '.join(LISTS['commonsense'])} are.")
    rows = [
        row | {"query": row.get("query", "") + _ANSWER.get(name, "")}
        for row in _read_rows(data)
        if row.get("task") in (name, {"social_iqa": "siqa"}.get(name))
    ]
    if not rows:
        raise ValueError(f"{data} has no rows of task {name!r}.")
    datasets = optional.load("datasets", "lm-evaluation-harness", "eval")
    config = {
        "task": name + _LOCAL,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metadata": {},
    }
    metrics = ["acc", "acc_norm"]
    if "context_options" in rows[0]:  # the contexts differ, and what follows is the same
        fields = {"doc_to_text": lambda row: row["gold"], "doc_to_choice": lambda row: row["context_options"]}
        fields["doc_to_target"], metrics = (lambda row: row["continuation"]), ["acc"]
    elif "choices" in rows[0]:
        fields = {"doc_to_text": "{{query}}", "doc_to_choice": lambda row: row["choices"]}
        fields["doc_to_target"] = lambda row: row["gold"]
    else:
        fields = {"doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}"}
        config["output_type"], metrics = "loglikelihood", ["perplexity", "acc"]
    metric_list = [
        {
            "metric": metric,
            "aggregation": "perplexity" if metric == "perplexity" else "mean",
            "higher_is_better": metric != "perplexity",
        }
        for metric in metrics
    ]
    return config | fields | {"metric_list": metric_list}


def _read_rows(data: str | Path) -> list[dict[str, Any]]:
    path = resolve_path(data)
    files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
    return [row for file in files for _, row in read_json_lines(file)]
