"""Measure a trained model; the results are JSON and a table next to the paper's numbers.

idattn evaluate --checkpoint=runs/quickstart --tasks=perplexity,length,passkey --out=runs/quickstart/evals

perplexity  what the run held out, in windows as in training: loss, perplexity, bits per byte, each document's
length      perplexity of --corpora, without them of what was held out, in windows of each of --lengths, and its mean;
            the loss by position, and a plot, length.png
passkey     RULER S-NIAH-1 in prompts of each of --lengths
phonebook   a number of a phone book of each of --entries
mqar        recall of each of --entries pairs of tokens in each of --lengths
posterior   the posterior variance of each query, with the layer read as a Gaussian process (`idattn.evals.posterior`):
            its rank correlation with the loss in what was held out, and the loss by its deciles, posterior.png
any task of lm-evaluation-harness (the extra "eval"), and lists of the paper's: commonsense (eight tasks), based_recall,
            longbench14; with --eval_data the eight tasks are read from there, not from the network. Rows longer than
            those of training are cut as the harness does it; --window=0 reads them whole

OUT/results.json and OUT/results.md are written after every task; they retain the results of other tasks.
"""

import dataclasses
import json
from typing import Any

import jax
from absl import flags, logging

from idattn.evals import harness
from idattn.evals.paper import table
from idattn.evals.tasks import TASKS, Settings, Subject, check_task, run_task
from idattn.files import read_json, resolve_path, write_atomic
from idattn.train.checkpoint import checkpoint_tokenizer, load_params
from idattn.trained import assemble

FLAGS = flags.FLAGS
RECORDED = (  # a setting of one task is part of its result: a new name here parts new records from old ones
    "corpora", "lengths", "entries", "eval_data", "limit", "max_rows", "max_tokens", "seed", "state_dtype",
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint", None, "Folder of a run, a checkpoint or exported weights, or hf:OWNER/NAME.", required=True
    )
    flags.DEFINE_string("tokenizer", "", "A copy of the checkpoint's tokenizer; empty for the one that it contains.")
    flags.DEFINE_list("tasks", ["perplexity"], f"Any of {', '.join([*TASKS, *harness.LISTS])}, or lm-eval's.")
    flags.DEFINE_string("out", None, "Folder of the results; it is made where there is none.", required=True)
    flags.DEFINE_list(
        "corpora",
        [],
        "Texts or prepared folders (of which the documents to validate on) for length: PATH or NAME=PATH.",
    )
    flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192"], "Tokens of a window or prompt.")
    flags.DEFINE_list("entries", ["16", "32", "64", "128"], "Entries of a phone book, pairs of mqar.")
    flags.DEFINE_string("eval_data", None, "JSONL file, or folder of such files, with the rows of the eight tasks.")
    flags.DEFINE_integer("limit", 200, "Questions of a recall task.", lower_bound=1)
    flags.DEFINE_integer("max_rows", None, "Rows of each task of lm-evaluation-harness; all if not given.", 1)
    flags.DEFINE_integer("max_tokens", 2**20, "Tokens to read of each text, from its beginning.", lower_bound=1)
    flags.DEFINE_integer("batch_tokens", 2**14, "Tokens of the rows that are read together.", lower_bound=1)
    flags.DEFINE_integer(
        "window",
        None,
        "Tokens of a row of lm-evaluation-harness that are read: longer ones lose their beginning, or are read in such "
        "windows where their perplexity is asked for. The trained length if not given; 0 reads every row whole.",
        lower_bound=0,
    )
    flags.DEFINE_float("noise", 1.0, "Variance of the noise of values, relative to the prior's, for posterior.")
    flags.DEFINE_integer("seed", 42, "Seed of the questions.")
    flags.DEFINE_enum("state_dtype", "float32", ["float32", "bfloat16"], "Dtype of stored states.")
    flags.DEFINE_integer("chunk_size", 512, "Tokens of a row that are read at a time.", lower_bound=1)


def settings() -> Settings:
    """What the flags say of the tasks, with rows as long as they are."""
    for name in ("lengths", "entries"):
        if not all(value.isdecimal() and int(value) for value in getattr(FLAGS, name)):
            raise ValueError(f"--{name}={','.join(getattr(FLAGS, name))} must be whole numbers above 0.")
    return Settings(
        corpora=tuple(FLAGS.corpora),
        lengths=tuple(sorted({*map(int, FLAGS.lengths)})),
        entries=tuple(sorted({*map(int, FLAGS.entries)})),
        eval_data=FLAGS.eval_data,
        limit=FLAGS.limit,
        max_rows=FLAGS.max_rows,
        max_tokens=FLAGS.max_tokens,
        batch_tokens=FLAGS.batch_tokens,
        noise=FLAGS.noise,
        seed=FLAGS.seed,
        figures=resolve_path(FLAGS.out),
    )


def main(_):
    logging.get_absl_logger().manager.getLogger("lm_eval").setLevel("ERROR")  # it warns of what is meant
    for task in FLAGS.tasks:
        check_task(task)
    wanted = settings()
    config, params, step = load_params(FLAGS.checkpoint)
    window = config.data.seq_len if FLAGS.window is None else FLAGS.window or None
    wanted = dataclasses.replace(wanted, window=window)
    out = resolve_path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: dict[str, Any] = {"checkpoint": str(FLAGS.checkpoint), "step": step, "tasks": {}}
    if file.exists():
        stored = read_json(file, "Delete it to evaluate anew, or name another folder with --out.")
        if not stored.keys() >= results.keys() or not isinstance(stored["tasks"], dict):
            raise ValueError(f"{file} has no results of an evaluation; name another folder with --out.")
        if {**stored, "tasks": {}} != results:
            raise ValueError(
                f"{file} has the results of {stored['checkpoint']}, step {stored['step']}, not those of "
                f"{FLAGS.checkpoint}, step {step}; name another folder with --out."
            )
        results = stored
    tokenizer = checkpoint_tokenizer(FLAGS.checkpoint, config, name=FLAGS.tokenizer)
    model = assemble(config, params, step, tokenizer, chunk_size=FLAGS.chunk_size, state_dtype=FLAGS.state_dtype)
    subject = Subject(config, params, model.decoder, model.tokenizer)
    about = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "settings": {name: getattr(FLAGS, name) for name in RECORDED} | {"window": window},
    }
    for task in FLAGS.tasks:
        results["tasks"][task] = run_task(task, subject, wanted) | about
        write_atomic(file, json.dumps(results, indent=1))
        write_atomic(out / "results.md", table(results, config) + "\n")
    print(f"{FLAGS.checkpoint}, step {step}\n\n{table(results, config)}")
