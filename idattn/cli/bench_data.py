"""Time preparing text and reading it back, next to Hugging Face datasets and to what training consumes.

idattn bench-data --source=austen --tokenizer=tokenizer.model

Preparing is timed in one process, in turns with `datasets.map` of the same tokenizer, which must count the same tokens.
Both are timed by processor time, which other work on the machine does not change. The loader reads shuffled batches of
the folder; its speed is compared with what the 1.3B config consumes on a chip.
"""

import json
import tempfile
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

from idattn.chips import CHIPS, device_peak_flops
from idattn.config import from_config_dict
from idattn.config_files import load_config
from idattn.costs import training_flops_per_token
from idattn.data import (
    Corpus,
    Preparation,
    TokenStream,
    TokenWindows,
    load_tokenizer,
    optional,
    prepare,
    train_iterator,
)

FLAGS = flags.FLAGS
_BATCHES = 200


def define_flags() -> None:
    flags.DEFINE_string("source", "austen", "Text to prepare, as for idattn prepare-data.")
    flags.DEFINE_string("tokenizer", "bytes", "Tokenizer, as for idattn prepare-data.")
    flags.DEFINE_integer("limit_mb", 16, "Megabytes of text to use.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Runs, of which the best counts.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 4096, "T, tokens in a window.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "B, windows in a batch.", lower_bound=1)
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    flags.DEFINE_enum("chip", "TPU v5p", kinds, "Chip that trains, by jax's name of its kind.")
    flags.DEFINE_float("utilisation", 0.4, "Share of its peak that the chip reaches.")


def main(_):
    texts, left = [], FLAGS.limit_mb << 20
    for document in Corpus(FLAGS.source):
        texts.append(document.text[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    tokenizer = load_tokenizer(FLAGS.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = Preparation(source=str(source), tokenizer=FLAGS.tokenizer, validation=0.0)
        ours, theirs = [], []
        for repeat in tqdm(range(FLAGS.repeats), desc="prepare and map"):
            out = Path(folder) / f"{repeat}"
            ours.append(seconds(lambda out=out: prepare(settings, out)))
            theirs.append(seconds(lambda repeat=repeat: map_texts(source, tokenizer, Path(folder) / f"cache-{repeat}")))
        (best, tokens), (best_map, map_tokens) = min(ours), min(theirs)
        if tokens != map_tokens:
            raise AssertionError(f"{tokens} tokens by prepare, {map_tokens} by datasets.map.")
        read = max(read_speed(out, tokenizer.bos_id) for _ in range(FLAGS.repeats))
    size = sum(len(text.encode()) for text in texts)
    model = from_config_dict(load_config("paper:1.3B,interdomain")).model
    needed = FLAGS.utilisation * device_peak_flops(FLAGS.chip) / training_flops_per_token(model, FLAGS.seq_len)
    print(
        f"prepare, a core           {tokens / best:>14,.0f} tokens/s  {size / best / 1e6:.2f} MB/s of text\n"
        f"datasets.map, a core      {tokens / best_map:>14,.0f} tokens/s  prepare: {best_map / best:.2f} times that\n"
        f"loader, a process         {read:>14,.0f} tokens/s  feeds {read / needed:,.0f} of\n"
        f"1.3B on a {FLAGS.chip:<15} {needed:>14,.0f} tokens/s  at {FLAGS.utilisation:.0%} of its peak"
    )


def seconds(function) -> tuple[float, int]:
    """The processor time that a function takes, on all threads, and the tokens that it says it made."""
    begin = time.process_time()
    result = function()
    tokens = result if isinstance(result, int) else result["splits"]["train"]["tokens"]
    return time.process_time() - begin, tokens


def map_texts(source: Path, tokenizer, cache: Path) -> int:
    """Tokenizes by datasets.map in its default batches; returns the number of tokens, one BOS a document included."""
    datasets = optional.load("datasets", "idattn bench-data")
    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(cache))
    ids = rows.map(lambda batch: {"ids": [tokenizer.encode(text) for text in batch["text"]]}, batched=True)
    return sum(len(row) + 1 for row in ids.with_format("numpy")["ids"])


def read_speed(folder: Path, bos_id: int) -> float:
    """Tokens per second of the training iterator over a prepared folder."""
    windows = TokenWindows(TokenStream(folder, "train"), bos_id=bos_id, seq_len=FLAGS.seq_len)
    batches = train_iterator([windows], FLAGS.batch_size, 0)
    next(batches)  # starts the threads
    begin = time.perf_counter()
    for _ in range(_BATCHES):
        next(batches)
    return _BATCHES * FLAGS.batch_size * FLAGS.seq_len / (time.perf_counter() - begin)
