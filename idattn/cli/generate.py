"""Continue text with a trained model.

idattn generate --checkpoint=runs/quickstart --prompt="It was a truth"
cat book.txt | idattn generate --checkpoint=runs/quickstart --prompt_file=- --save_context=book.safetensors
idattn generate --checkpoint=runs/quickstart --load_context=book.safetensors --prompt=" And then"
idattn generate --checkpoint=runs/quickstart --jsonl=prompts.jsonl --out=answers.jsonl

The text appears as it is written; of several samples the first does. A context file holds all that the model stores of
a prompt, so that the prompt is not read again. In JSONL mode every row {"prompt": ...} comes back with its
"completions" as soon as its batch is done; a row may have settings, as {"prompt": ..., "temperature": 0.5, "seed": 7}.
"""

import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from idattn.config import MeshConfig
from idattn.files import disk_path, read_json_lines, resolve_path
from idattn.inference import generate_text, load_context, right_pad, save_context
from idattn.inference.text import encode_prompt
from idattn.sharding import make_mesh
from idattn.trained import load

FLAGS = flags.FLAGS
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint", None, "Folder of a run, a checkpoint or exported weights, or hf:OWNER/NAME.", required=True
    )
    flags.DEFINE_string("tokenizer", "", "A copy of the checkpoint's tokenizer; empty for the one that it contains.")
    flags.DEFINE_string("prompt", "", "Text to continue; empty starts a document.")
    flags.DEFINE_string("prompt_file", None, "File of the text to continue, - for standard input.")
    flags.DEFINE_string("jsonl", None, "File of prompts, one JSON object a row.")
    flags.DEFINE_string(
        "out", None, "File for the rows of --jsonl, to which they are appended; without, they are printed."
    )
    flags.DEFINE_integer("num_tokens", 400, "Tokens to add at most.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "Prompts of --jsonl that are read together.", lower_bound=1)
    flags.DEFINE_multi_string("stop", [], "Text to stop before; may be given several times.")
    flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Sample among this many most likely tokens; 0: among all.")
    flags.DEFINE_float("top_p", 1.0, "Sample among the most likely tokens that together have this probability.")
    flags.DEFINE_float("min_p", 0.0, "Sample what is at least this many times as likely as the most likely token.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Makes tokens that have occurred less likely where above 1.")
    flags.DEFINE_integer("seed", 0, "Seed of the first sample; further samples have the next seeds.")
    flags.DEFINE_string("load_context", None, "File of a context that the prompts follow.")
    flags.DEFINE_string("save_context", None, "File to save the context of the prompt in.")
    flags.DEFINE_enum("state_dtype", "float32", ["float32", "bfloat16"], "Dtype of stored states.")
    flags.DEFINE_integer("chunk_size", 512, "Tokens of a prompt that are read at a time.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Devices to split the model over, by heads.", lower_bound=1)


def continue_prompt(decoder, tokenizer, context, settings) -> None:
    """Print the continuations of one prompt as they come."""
    prompt = FLAGS.prompt
    if FLAGS.prompt_file:
        prompt = sys.stdin.read() if FLAGS.prompt_file == "-" else resolve_path(FLAGS.prompt_file).read_text("utf-8")
    shown = prompt
    if FLAGS.save_context:
        tokens = encode_prompt(tokenizer, prompt, continues=context is not None)
        if context is None or tokens.size:
            context = decoder.prefill(*right_pad([tokens]), context)
        save_context(FLAGS.save_context, context, decoder)
        prompt = ""
    print(f"\n{shown}", end="", flush=True)
    times = []

    def on_text(row: int, text: str) -> None:
        times.append(time.perf_counter())
        if row == 0:
            print(text, end="", flush=True)

    times.append(time.perf_counter())
    completions = generate_text(
        decoder, tokenizer, [prompt] * FLAGS.num_samples, FLAGS.num_tokens, context=context, stop=FLAGS.stop,
        on_text=on_text, **settings,
    )  # fmt: skip
    print("".join(f"\n\n{shown}{completion.text}" for completion in completions[1:]))
    count, later = (sum(max(len(c.tokens) - n, 0) for c in completions) for n in (0, decoder.block_size))
    if later:  # the first block waits for the programs to be compiled
        print(f"{count} tokens, {later / (times[-1] - times[1]):.1f} a second after the first block", file=sys.stderr)
    else:
        print(f"{count} tokens in {time.perf_counter() - times[0]:.1f} s, programs compiled", file=sys.stderr)


def continue_rows(decoder, tokenizer, context, settings) -> None:
    """Continue all prompts of a JSONL file, batch by batch."""
    rows = []
    for place, row in read_json_lines(FLAGS.jsonl):  # all of them, before anything is written
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"{place}: {row!r} must be an object with a text under 'prompt'.")
        for name in row.keys() & {*SETTINGS}:
            try:
                if isinstance(row[name], list):
                    raise ValueError(f"{name}={row[name]} must be one number.")
                decoder.sampling(1, **{name: row[name]})
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        rows.append(row)
    start, count = time.perf_counter(), 0
    with open(disk_path(FLAGS.out), "a", encoding="utf-8") if FLAGS.out else nullcontext(sys.stdout) as file:
        for first in tqdm(range(0, len(rows), FLAGS.batch_size), unit="batch", disable=None):
            batch = [row for row in rows[first : first + FLAGS.batch_size] for _ in range(FLAGS.num_samples)]
            each: dict[str, Any] = {
                name: np.array([row.get(name, settings[name]) for row in batch]) for name in SETTINGS
            }
            each["seed"] = (each["seed"] + np.arange(len(batch)) % FLAGS.num_samples) % 2**31
            prompts = [row["prompt"] for row in batch]
            done = generate_text(
                decoder, tokenizer, prompts, FLAGS.num_tokens, context=context, stop=FLAGS.stop, **each
            )
            for i in range(0, len(batch), FLAGS.num_samples):
                completions = [{"text": c.text, "finish": c.finish} for c in done[i : i + FLAGS.num_samples]]
                print(json.dumps(batch[i] | {"completions": completions}, ensure_ascii=False), file=file, flush=True)
            count += sum(len(c.tokens) for c in done)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second", file=sys.stderr)


def main(_):
    if sum(bool(x) for x in (FLAGS.prompt, FLAGS.prompt_file, FLAGS.jsonl)) > 1:
        raise ValueError("give one of --prompt, --prompt_file and --jsonl.")
    devices = jax.devices()
    if FLAGS.tensor > len(devices):
        raise ValueError(f"--tensor={FLAGS.tensor} must be at most the {len(devices)} devices that are there.")
    mesh = make_mesh(MeshConfig(data=1, tensor=FLAGS.tensor), devices[: FLAGS.tensor]) if FLAGS.tensor > 1 else None
    with jax.set_mesh(mesh) if mesh else nullcontext():
        decoder, tokenizer, _, step = load(
            FLAGS.checkpoint,
            tokenizer=FLAGS.tokenizer,
            chunk_size=FLAGS.chunk_size,
            state_dtype=FLAGS.state_dtype,
        )
        context = load_context(FLAGS.load_context, decoder) if FLAGS.load_context else None
        settings = {name: getattr(FLAGS, name) for name in SETTINGS}
        decoder.sampling(1, **settings)
        if FLAGS.jsonl:
            continue_rows(decoder, tokenizer, context, settings)
        else:
            print(f"{FLAGS.checkpoint}, step {step}")
            continue_prompt(decoder, tokenizer, context, settings)
