"""The tasks of `idattn evaluate`: functions of what is measured and the settings, in one table."""

import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from idattn.choices import check_choice
from idattn.config import Config
from idattn.data import Tokenizer, eval_batches, load_data, load_stream, mqar_rows
from idattn.evals import harness, length, posterior, recall
from idattn.evals.perplexity import document_losses, token_losses
from idattn.evals.scores import batch_rows, progress, share_error
from idattn.inference import Decoder
from idattn.nn import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the tasks; a task reads those that concern it."""

    corpora: tuple[str, ...] = ()  # PATH or NAME=PATH of texts or prepared folders; none: what the run held out
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)  # tokens of a window or prompt
    entries: tuple[int, ...] = (16, 32, 64, 128)  # of a phone book; pairs of mqar
    eval_data: str | None = None  # file or folder with the rows of the eight commonsense tasks; None: the network
    limit: int = 200  # questions of a recall task
    max_rows: int | None = None  # of each task of lm-evaluation-harness; None: all
    max_tokens: int = 2**20  # to read of each text, from its beginning
    batch_tokens: int = 2**14  # of the rows that are read together
    noise: float = 1.0  # of values, relative to the prior variance, for `idattn.evals.posterior`
    window: int | None = None  # tokens that lm-evaluation-harness's rows are cut to; None: none is cut
    seed: int = 42  # of the questions
    figures: epath.Path | None = None  # folder for plots; None: none are drawn

    def __post_init__(self):
        for name in ("lengths", "entries"):
            if not all(n > 0 for n in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be whole numbers above 0.")
        for name in ("limit", "max_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.noise > 0:
            raise ValueError(f"noise={self.noise} must be above 0.")


class Subject(NamedTuple):
    """What is measured: a trained model, of which the perplexity needs the parameters as they were trained."""

    config: Config
    params: Any
    decoder: Decoder
    tokenizer: Tokenizer


def perplexity(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Losses of every source's validation windows, and of each document in them."""
    config = subject.config
    tokenizer, _, sources = load_data(config.data, subject.tokenizer)
    graphdef = nnx.graphdef(LanguageModel.abstract(config.model, config.compute))
    losses = jax.jit(lambda batch: token_losses(graphdef, subject.params, batch, config))
    metrics, documents = {}, []
    for number, windows in enumerate(sources):
        T = config.data.seq_len
        part = [windows[i] for i in range(min(len(windows), -(-settings.max_tokens // T)))]
        batches = list(eval_batches([part], min(batch_rows(settings.batch_tokens, T), len(part)), len(part)))
        sums = document_losses(losses, progress(batches, "perplexity"), tokenizer.bos_id)
        tokens = windows.stream[: len(part) * T + 1]
        starts = np.flatnonzero(tokens[:-1] == tokenizer.bos_id)
        texts = [tokenizer.decode(document) for document in np.split(tokens, starts)[1:]]
        sizes = [len(text.encode()) for text in texts]
        suffix = f" {number}" if len(sources) > 1 else ""
        total = measures(*sums.sum(0), size=sum(sizes))
        metrics |= {f"{name}{suffix}": total[name] for name in ("loss", "perplexity", "bits_per_byte")}
        for text, size, row in zip(texts, sizes, sums, strict=True):
            documents.append({"text": text[:40], "source": number} | measures(*row, size=size))
            tqdm.write("{tokens:>10,}  {loss:>14.4f}  {perplexity:>10.2f}  {text!r}".format(**documents[-1]))
        tqdm.write("{tokens:>10,}  {loss:>14.4f}  {perplexity:>10.2f}  all of them".format(**total))
    return {"metrics": metrics, "documents": documents}


def measures(nats: float, tokens: float, size: int) -> dict[str, Any]:
    """Loss in nats per token, perplexity and bits per byte of text; tokens that are none have a loss of 0."""
    mean = nats / max(tokens, 1)
    bits = nats / np.log(2) / max(size, 1)
    return {"tokens": int(tokens), "loss": mean, "perplexity": float(np.exp(mean)), "bits_per_byte": float(bits)}


def lengths(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Perplexity in windows of each length over every corpus."""
    if settings.corpora:
        paths = length.corpus_paths(settings.corpora)
        streams = {name: load_stream(path, subject.tokenizer) for name, path in paths.items()}
    else:
        _, _, sources = load_data(subject.config.data, subject.tokenizer)
        streams = {f"validation{n or ''}": windows.stream for n, windows in enumerate(sources)}
    corpora = {
        name: length.length_losses(
            subject.decoder,
            stream,
            settings.lengths,
            num_tokens=settings.max_tokens,
            batch_tokens=settings.batch_tokens,
            name=name,
        )
        for name, stream in streams.items()
    }
    if settings.figures is not None:
        length.plot_lengths(corpora, subject.config.data.seq_len, settings.figures / "length.png")
    metrics = {f"{name} {n}": result["perplexity"] for name, each in corpora.items() for n, result in each.items()}
    if len(corpora) > 1:
        metrics |= {f"mean {n}": value for n, value in length.mean_perplexities(corpora).items()}
    return {"metrics": metrics, "corpora": corpora}


def posterior_variance(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The rank correlation of the variance of each query with the loss, next to what else correlates, and its curve."""
    config, T = subject.config, subject.config.data.seq_len
    _, _, sources = load_data(config.data, subject.tokenizer)
    streams = [np.asarray(windows.stream[: settings.max_tokens]).astype(np.int32) for windows in sources]
    tokens = np.concatenate([stream[: len(stream) // T * T].reshape(-1, T) for stream in streams])
    values = posterior.measure(config, subject.params, tokens, batch_rows(settings.batch_tokens, T), settings.noise)
    correlations = posterior.correlate(values, settings.seed)
    curves = {
        name: posterior.calibration(x, values["loss"], settings.seed)
        for name, x in values.items()
        if name == "all" or name.startswith("layer")
    }
    if settings.figures is not None:
        posterior.plot_posterior(correlations, curves, settings.figures / "posterior.png")
    metrics, errors, intervals = ({name: x[i] for name, x in correlations.items()} for i in range(3))
    more = {"intervals": intervals, "curves": curves, "tokens": tokens.size, "noise": settings.noise}
    return {"metrics": metrics, "errors": errors} | more


def passkey(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The share of numbers that are recalled in prompts of each length."""
    tests = {str(n): recall.passkey(subject.tokenizer, n, settings.limit, seed=settings.seed) for n in settings.lengths}
    return recalled(subject, settings, tests)


def phonebook(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The share of phone numbers given in books of each size."""
    tests = {str(n): recall.phonebook(n, settings.limit, seed=settings.seed) for n in settings.entries}
    return recalled(subject, settings, tests, whole=True)


def recalled(
    subject: Subject, settings: Settings, tests: dict[str, list[recall.Question]], whole: bool = False
) -> dict[str, Any]:
    """The share of questions answered in each test, with what was asked and written."""
    result: dict[str, Any] = {"metrics": {}, "errors": {}, "sha256": {}, "answers": {}}
    for name, questions in tests.items():
        longest = max(len(subject.tokenizer.encode(question.prompt)) for question in questions)
        share, written = recall.ask(
            subject.decoder,
            subject.tokenizer,
            questions,
            num_tokens=128,
            batch_size=batch_rows(settings.batch_tokens, longest),
            whole=whole,
        )
        result["metrics"][name], result["sha256"][name] = share, recall.fingerprint(questions)
        if len(questions) > 1:
            result["errors"][name] = share_error(share, len(questions))
        result["answers"][name] = [[q.answer, text] for q, text in zip(questions, written, strict=True)]
    return result


def mqar(subject: Subject, settings: Settings) -> dict[str, Any]:
    """The share of values recalled for each number of pairs in each length."""
    result: dict[str, Any] = {"metrics": {}, "sha256": {}}
    vocab_size, bos_id = subject.tokenizer.vocab_size, subject.tokenizer.bos_id  # as in training
    for T in settings.lengths:
        for pairs in settings.entries:
            tokens, is_answer = mqar_rows(vocab_size, bos_id, T, pairs, settings.limit, seed=settings.seed)
            name = f"{pairs} pairs in {T}"
            result["metrics"][name] = recall.mqar_accuracy(
                subject.decoder, tokens, is_answer, batch_size=batch_rows(settings.batch_tokens, T)
            )
            result["sha256"][name] = recall.fingerprint(tokens)
    return result


def lm_eval(subject: Subject, settings: Settings, task: str) -> dict[str, Any]:
    """The metrics of a task of lm-evaluation-harness; those of a list with the mean that the paper gives."""
    lm = harness.make_lm(subject.decoder, subject.tokenizer, settings.batch_tokens, settings.window)
    results = harness.evaluate(lm, harness.LISTS.get(task, (task,)), settings.eval_data, settings.max_rows)
    metrics = {f"{name} {metric}": x for name, result in results.items() for metric, x in result.metrics.items()}
    errors = {f"{name} {metric}": x for name, result in results.items() for metric, x in result.errors.items()}
    if task in harness.LISTS:
        metrics["mean"] = float(
            np.mean([harness.main_metric(name, result.metrics) for name, result in results.items()])
        )
    versions = {name: result.version for name, result in results.items() if result.version is not None}
    return {
        "metrics": metrics,
        "errors": errors,
        "local": bool(settings.eval_data),
        "window": settings.window,
        "versions": {"lm_eval": harness.package_version()} | versions,
    }


# A task is a row here: it returns its `metrics` by name, with whatever else its record shall hold.
TASKS: dict[str, Callable[[Subject, Settings], dict[str, Any]]] = {
    "perplexity": perplexity,
    "length": lengths,
    "passkey": passkey,
    "phonebook": phonebook,
    "mqar": mqar,
    "posterior": posterior_variance,
}


def check_task(name: str) -> None:
    """Raise a ValueError that names the nearest task, unless `name` is one of this table or of lm-eval's."""
    known = [*TASKS, *harness.LISTS, *itertools.chain(*harness.LISTS.values())]
    if name not in known and name not in (names := harness.task_names()):
        check_choice("task", name, [*known, *difflib.get_close_matches(name, names)])


def run_task(name: str, subject: Subject, settings: Settings) -> dict[str, Any]:
    """The result of a task: its `metrics` by name, and what else it has to record."""
    return TASKS[name](subject, settings) if name in TASKS else lm_eval(subject, settings, name)
