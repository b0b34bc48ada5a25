"""Measure a trained model; the results are JSON and a table beside the paper's numbers.

idattn evaluate --checkpoint=runs/quickstart --tasks=perplexity,length,passkey --out=runs/quickstart/evals

perplexity  what the run held out, in windows as in training: loss, perplexity, bits per byte, each document's
length      perplexity of --corpora, without them of what was held out, in windows of each of --lengths, and its mean;
            the loss by position, and a plot, length.png
passkey     RULER S-NIAH-1 in prompts of each of --lengths
phonebook   a number of a phone book of each of --entries
mqar        recall of each of --entries pairs of tokens in each of --lengths
any task of lm-evaluation-harness (the extra "eval"), and lists of the paper's: commonsense (eight tasks), based_recall,
            longbench14; with --eval_data the eight tasks are read from there, not from the network

OUT/results.json and OUT/results.md are written after every task; those of other tasks that are there stay.
"""

import difflib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from tqdm import tqdm

from idattn.choices import check_choice
from idattn.cli.generate import make_decoder
from idattn.config import Config
from idattn.data import Tokenizer, eval_batches, load_data, load_stream, load_tokenizer, mqar_rows
from idattn.evals import harness, length, recall
from idattn.evals.paper import beside
from idattn.evals.perplexity import document_losses, token_losses
from idattn.inference import Decoder
from idattn.nn import LanguageModel
from idattn.train.checkpoint import load_params
from idattn.train.storage import write_whole

FLAGS = flags.FLAGS
SETTINGS = (
    "corpora", "lengths", "entries", "eval_data", "limit", "max_rows", "max_tokens", "seed", "state_dtype",
)  # fmt: skip
_COLUMNS = ("task", "metric", "here", "paper")


def define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint", None, "Folder of a run, of one of its checkpoints, or of exported weights.", required=True
    )
    flags.DEFINE_list("tasks", ["perplexity"], f"Any of {', '.join([*TASKS, *harness.LISTS])}, or lm-eval's.")
    flags.DEFINE_string("out", None, "Folder of the results; it is made where there is none.", required=True)
    flags.DEFINE_list(
        "corpora",
        [],
        "Texts or prepared folders (of which the documents to validate on) for length: PATH or NAME=PATH.",
    )
    flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192"], "Tokens of a window or prompt.")
    flags.DEFINE_list("entries", ["16", "32", "64", "128"], "Entries of a phone book, pairs of mqar.")
    flags.DEFINE_string("eval_data", None, "JSONL file, or folder of some, with the rows of the eight tasks.")
    flags.DEFINE_integer("limit", 200, "Questions of a recall task.", lower_bound=1)
    flags.DEFINE_integer("max_rows", None, "Rows of each task of lm-evaluation-harness; all if not given.", 1)
    flags.DEFINE_integer("max_tokens", 2**20, "Tokens to read of each text, from its beginning.", lower_bound=1)
    flags.DEFINE_integer("batch_tokens", 2**14, "Tokens of the rows that are read together.", lower_bound=1)
    flags.DEFINE_integer("seed", 42, "Of the questions.")
    flags.DEFINE_enum("state_dtype", "float32", ["float32", "bfloat16"], "What states are kept in.")
    flags.DEFINE_integer("chunk_size", 512, "Tokens of a row that are read at a time.", lower_bound=1)


class Subject(NamedTuple):
    """What is measured."""

    config: Config
    params: Any
    decoder: Decoder
    tokenizer: Tokenizer


def perplexity(subject: Subject) -> dict[str, Any]:
    """Losses of every source's validation windows, and of each document in them."""
    config = subject.config
    tokenizer, _, sources = load_data(config.data)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config.model, config.compute, rngs=nnx.Rngs(0))))
    losses = jax.jit(lambda batch: token_losses(graphdef, subject.params, batch, config))
    metrics, documents = {}, []
    for number, windows in enumerate(sources):
        T = config.data.seq_len
        part = [windows[i] for i in range(min(len(windows), -(-FLAGS.max_tokens // T)))]
        batches = list(eval_batches([part], config.train.batch_size, len(part)))
        sums = document_losses(losses, tqdm(batches, unit="batch", leave=False, disable=None), tokenizer.bos_id)
        tokens = windows.stream[: len(part) * T + 1]
        starts = np.flatnonzero(tokens[:-1] == tokenizer.bos_id)
        texts = [tokenizer.decode(document) for document in np.split(tokens, starts)[1:]]
        sizes = [len(text.encode()) for text in texts]
        mark = f" {number}" if len(sources) > 1 else ""
        total = measures(*sums.sum(0), sum(sizes))
        metrics |= {f"{name}{mark}": total[name] for name in ("loss", "perplexity", "bits_per_byte")}
        for text, size, row in zip(texts, sizes, sums, strict=True):
            documents.append({"text": text[:40], "source": number} | measures(*row, size))
            tqdm.write("{tokens:>10,}  {loss:>14.4f}  {perplexity:>10.2f}  {text!r}".format(**documents[-1]))
        tqdm.write("{tokens:>10,}  {loss:>14.4f}  {perplexity:>10.2f}  all of them".format(**total))
    return {"metrics": metrics, "documents": documents}


def measures(nats: float, tokens: float, size: int) -> dict[str, Any]:
    """Loss in nats per token, perplexity and bits per byte of text; tokens that are none have a loss of 0."""
    mean = nats / max(tokens, 1)
    bits = nats / np.log(2) / max(size, 1)
    return {"tokens": int(tokens), "loss": mean, "perplexity": float(np.exp(mean)), "bits_per_byte": float(bits)}


def lengths(subject: Subject) -> dict[str, Any]:
    """Perplexity in windows of each length over every corpus."""
    if FLAGS.corpora:
        streams = {}
        for corpus in FLAGS.corpora:
            name, _, path = corpus.rpartition("=")
            streams[name or Path(path).name.split(".")[0]] = load_stream(path, subject.tokenizer)
    else:
        _, _, sources = load_data(subject.config.data)
        streams = {f"validation{n or ''}": windows.stream for n, windows in enumerate(sources)}
    corpora = {
        name: length.length_losses(
            subject.decoder, stream, wanted_lengths(), num_tokens=FLAGS.max_tokens, batch_tokens=FLAGS.batch_tokens,
            name=name,
        )
        for name, stream in streams.items()
    }  # fmt: skip
    length.plot_lengths(corpora, subject.config.data.seq_len, Path(FLAGS.out) / "length.png")
    metrics = {f"{name} {n}": found["perplexity"] for name, each in corpora.items() for n, found in each.items()}
    if len(corpora) > 1:
        metrics |= {f"mean {n}": value for n, value in length.mean_perplexities(corpora).items()}
    return {"metrics": metrics, "corpora": corpora}


def passkey(subject: Subject) -> dict[str, Any]:
    """The share of numbers found in prompts of each length."""
    return recalled(
        subject, {str(n): recall.passkey(subject.tokenizer, n, FLAGS.limit, seed=FLAGS.seed) for n in wanted_lengths()}
    )


def phonebook(subject: Subject) -> dict[str, Any]:
    """The share of phone numbers given in books of each size."""
    return recalled(subject, {str(n): recall.phonebook(n, FLAGS.limit, seed=FLAGS.seed) for n in entries()}, whole=True)


def recalled(subject: Subject, tests: dict[str, list[recall.Question]], whole: bool = False) -> dict[str, Any]:
    """The share of questions answered in each test, with what was asked and written."""
    result: dict[str, Any] = {"metrics": {}, "sha256": {}, "answers": {}}
    for name, questions in tests.items():
        longest = max(len(subject.tokenizer.encode(question.prompt)) for question in questions)
        share, written = recall.ask(
            subject.decoder, subject.tokenizer, questions, num_tokens=128, batch_size=rows(longest), whole=whole
        )
        result["metrics"][name], result["sha256"][name] = share, recall.fingerprint(questions)
        result["answers"][name] = [[q.answer, text] for q, text in zip(questions, written, strict=True)]
    return result


def mqar(subject: Subject) -> dict[str, Any]:
    """The share of values recalled for each number of pairs in each length."""
    result: dict[str, Any] = {"metrics": {}, "sha256": {}}
    for T in wanted_lengths():
        for pairs in entries():
            tokens, is_answer = mqar_rows(
                subject.config.model.vocab_size, subject.tokenizer.bos_id, T, pairs, FLAGS.limit, seed=FLAGS.seed
            )
            name = f"{pairs} pairs in {T}"
            result["metrics"][name] = recall.mqar_accuracy(subject.decoder, tokens, is_answer, batch_size=rows(T))
            result["sha256"][name] = recall.fingerprint(tokens)
    return result


def lm_eval(subject: Subject, task: str) -> dict[str, Any]:
    """The metrics of a task of lm-evaluation-harness; those of a list with the mean that the paper gives."""
    lm = harness.make_lm(subject.decoder, subject.tokenizer, FLAGS.batch_tokens)
    found = harness.evaluate(lm, harness.LISTS.get(task, (task,)), FLAGS.eval_data, FLAGS.max_rows)
    metrics = {f"{name} {metric}": value for name, values in found.items() for metric, value in values.items()}
    if task in harness.LISTS:
        metrics["mean"] = float(np.mean([harness.main_metric(name, values) for name, values in found.items()]))
    return {"metrics": metrics, "local": bool(FLAGS.eval_data)}


TASKS = {"perplexity": perplexity, "length": lengths, "passkey": passkey, "phonebook": phonebook, "mqar": mqar}


def wanted_lengths() -> list[int]:
    return sorted({int(n) for n in FLAGS.lengths})


def entries() -> list[int]:
    return sorted({int(n) for n in FLAGS.entries})


def rows(tokens: int) -> int:
    """How many rows of so many tokens are read together."""
    return max(1, FLAGS.batch_tokens // tokens)


def table(results: dict[str, Any], config: Config) -> str:
    """All metrics in markdown."""
    lines = [_COLUMNS, ("---", "---", "---:", "---")]
    for task, result in results["tasks"].items():
        for metric, value in result["metrics"].items():
            # Within a list, and for a single task, the metric's name begins with the task's.
            name, _, rest = metric.rpartition(" ")
            setting: Any = dict(config=config, step=results["step"], local=result.get("local", False))
            paper = beside(task, metric, **setting) or beside(name, rest, **setting)
            lines.append((task, metric, f"{value:.4f}", paper))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(_):
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().manager.getLogger("lm_eval").setLevel("ERROR")  # it warns of what is meant
    for task in FLAGS.tasks:
        own = [*TASKS, *harness.LISTS, *itertools.chain(*harness.LISTS.values())]
        if task not in own and task not in (names := harness.task_names()):
            check_choice("task", task, [*own, *difflib.get_close_matches(task, names)])
    for name in ("lengths", "entries"):
        if not all(value.isdecimal() and int(value) for value in getattr(FLAGS, name)):
            raise ValueError(f"--{name}={','.join(getattr(FLAGS, name))} must be whole numbers above 0.")
    config, params, step = load_params(FLAGS.checkpoint)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: dict[str, Any] = {"checkpoint": str(FLAGS.checkpoint), "step": step, "tasks": {}}
    if file.exists():
        found = json.loads(file.read_text())
        if {**found, "tasks": {}} != results:
            raise ValueError(
                f"{file} has the results of {found['checkpoint']}, step {found['step']}, not those of "
                f"{FLAGS.checkpoint}, step {step}; name another folder with --out."
            )
        results = found
    subject = Subject(config, params, make_decoder(config, params), load_tokenizer(config.data.tokenizer))
    about = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "settings": {name: getattr(FLAGS, name) for name in SETTINGS},
    }
    for task in FLAGS.tasks:
        results["tasks"][task] = (TASKS[task](subject) if task in TASKS else lm_eval(subject, task)) | about
        write_whole(file, json.dumps(results, indent=1))
        write_whole(out / "results.md", table(results, config) + "\n")
    print(f"{FLAGS.checkpoint}, step {step}\n\n{table(results, config)}")
