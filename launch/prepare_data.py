"""Prepare text for training: tokens in checked shards, which any number of runs can read in any order.

python -m launch.prepare_data --source=hf:HuggingFaceFW/fineweb-edu,sample-10BT --tokenizer=meta-llama/Llama-2-7b-hf \
    --out=data/fineweb-edu
python -m launch.prepare_data --source=books.jsonl.zst --train_vocab=8192 --out=data/books --validation=0.02

Interrupted, the same command goes on. FineWeb-Edu's samples are sample-10BT, sample-100BT and sample-350BT; default is
the whole, and NAME@REVISION pins what may change meanwhile. Without a network give --tokenizer=tokenizer.model and
--source=FOLDER with what was copied from where there is one:

hf download HuggingFaceFW/fineweb-edu --repo-type=dataset --include='sample/10BT/*' --local-dir=FOLDER

On several machines that share a folder: --engine=slurm or ray, by datatrove (pip install idattn[cluster]), such as
--engine=slurm --tasks=64 --engine_options='{"partition": "cpu", "time": "8:00:00"}'; or, by whatever starts jobs, this
on machine i of n with --part=i/n, and again until one says that the folder is complete.
"""

import json
import os
from pathlib import Path

from absl import app, flags

from idattn.data import Preparation, prepare
from idattn.data.cluster import submit

SOURCE = flags.DEFINE_string(
    "source", None, "'austen', hf:NAME[@REVISION][,CONFIG[,SPLIT]], .jsonl[.gz|.xz|.zst], .parquet, .txt or a folder.",
    required=True,
)  # fmt: skip
TOKENIZER = flags.DEFINE_string("tokenizer", "", "'bytes', a .model or .json file, or OWNER/NAME on the hub.")
OUT = flags.DEFINE_string("out", None, "Folder to write; a preparation that is there goes on.", required=True)
TRAIN_VOCAB = flags.DEFINE_integer("train_vocab", 0, "Pieces of a SentencePiece BPE to train on the source instead.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Name of the text in objects and rows.")
VALIDATION = flags.DEFINE_float(
    "validation", 0.001, "Share of the documents to validate on, by the hash of their text."
)
DEDUPLICATE = flags.DEFINE_bool("deduplicate", False, "Of documents with equal text keep the first.")
UNIT_MB = flags.DEFINE_integer("unit_mb", 64, "Megabytes of text in a shard, about; less for small sources.")
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes on this machine.")
PART = flags.DEFINE_string("part", "0/1", "i/n: do part i, from 0, of n.")
ENGINE = flags.DEFINE_enum("engine", "local", ["local", "slurm", "ray"], "What runs the parts.")
TASKS = flags.DEFINE_integer("tasks", 1, "Parts that the engine runs.")
ENGINE_OPTIONS = flags.DEFINE_string("engine_options", "{}", "JSON with more arguments of datatrove's executor.")


def main(_):
    settings = Preparation(
        source=SOURCE.value,
        tokenizer=TOKENIZER.value,
        train_vocab=TRAIN_VOCAB.value,
        text_field=TEXT_FIELD.value,
        validation=VALIDATION.value,
        deduplicate=DEDUPLICATE.value,
        unit_bytes=UNIT_MB.value << 20,
    )
    if ENGINE.value != "local":
        options = json.loads(ENGINE_OPTIONS.value)
        return submit(settings, OUT.value, engine=ENGINE.value, tasks=TASKS.value, **options)
    number, _, count = PART.value.partition("/")
    manifest = prepare(settings, OUT.value, workers=WORKERS.value, part=(int(number), int(count)))
    if manifest is None:
        print(f"part {PART.value} is done; {OUT.value} misses units of other parts")
        return
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    file = manifest["tokenizer"]["file"]
    print(
        f"{OUT.value} is complete: {train['tokens']:,} tokens in {train['documents']:,} documents to train on, "
        f"{validation['tokens']:,} in {validation['documents']:,} to validate on; left out {manifest['empty']:,} empty "
        f"and {manifest['duplicates']:,} duplicates\nto train on it: --config.data.source={OUT.value} "
        f"--config.data.tokenizer={Path(OUT.value) / file if file else 'bytes'} --config.data.holdout='()'"
    )


if __name__ == "__main__":
    app.run(main)
