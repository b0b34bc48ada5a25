r"""Prepare text for training: tokens in checked shards, which any number of runs can read in any order.

idattn prepare-data --source=hf:HuggingFaceFW/fineweb-edu,sample-10BT --tokenizer=meta-llama/Llama-2-7b-hf \
    --out=data/fineweb-edu
idattn prepare-data --source=books.jsonl.zst --train_vocab=8192 --out=data/books --validation=0.02

After an interruption, the same command resumes. FineWeb-Edu's samples are sample-10BT, sample-100BT and sample-350BT;
the name `default` stands for all of it. NAME@REVISION pins a data set that may change. Without a network, give
--tokenizer=tokenizer.model and --source=FOLDER with a copy that was made where there is a network:

hf download HuggingFaceFW/fineweb-edu --repo-type=dataset --include='sample/10BT/*' --local-dir=FOLDER

Several machines that share a folder can divide the work. datatrove (pip install idattn[cluster]) starts the parts with
--engine=slurm or --engine=ray, and takes --tasks=64 and --engine_options='{"partition": "cpu", "time": "8:00:00"}'.
Or start the command on machine i of n with --part=i/n, and again until one says that the folder is complete.
"""

import json
import os
from pathlib import Path

from absl import flags

from idattn.data import Preparation, prepare
from idattn.data.cluster import submit

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "source",
        None,
        "'austen', hf:NAME[@REVISION][,CONFIG[,SPLIT]], .jsonl[.gz|.xz|.zst], .parquet, .txt or a folder.",
        required=True,
    )
    flags.DEFINE_string("tokenizer", "", "'bytes', a .model or .json file, or OWNER/NAME on the hub.")
    flags.DEFINE_string("out", None, "Folder to write; a preparation that is there is resumed.", required=True)
    flags.DEFINE_integer("train_vocab", 0, "Pieces of a SentencePiece BPE to train on the source instead.")
    flags.DEFINE_string("text_field", "text", "Name of the text in objects and rows.")
    flags.DEFINE_float("validation", 0.001, "Share of the documents to validate on, by the hash of their text.")
    flags.DEFINE_bool("deduplicate", False, "Of documents with equal text write the first only.")
    flags.DEFINE_integer("unit_mb", 64, "Megabytes of text in a shard, about; less for small sources.")
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes on this machine.")
    flags.DEFINE_string("part", "0/1", "i/n: do part i, from 0, of n.")
    flags.DEFINE_enum("engine", "local", ["local", "slurm", "ray"], "What runs the parts.")
    flags.DEFINE_integer("tasks", 1, "Parts that the engine runs.")
    flags.DEFINE_string("engine_options", "{}", "JSON with more arguments of datatrove's executor.")


def main(_):
    settings = Preparation(
        source=FLAGS.source,
        tokenizer=FLAGS.tokenizer,
        train_vocab=FLAGS.train_vocab,
        text_field=FLAGS.text_field,
        validation=FLAGS.validation,
        deduplicate=FLAGS.deduplicate,
        unit_bytes=FLAGS.unit_mb << 20,
    )
    if FLAGS.engine != "local":
        options = json.loads(FLAGS.engine_options)
        return submit(settings, FLAGS.out, engine=FLAGS.engine, tasks=FLAGS.tasks, **options)
    number, _, count = FLAGS.part.partition("/")
    manifest = prepare(settings, FLAGS.out, workers=FLAGS.workers, part=(int(number), int(count)))
    if manifest is None:
        print(f"part {FLAGS.part} is done; {FLAGS.out} misses units of other parts")
        return
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    file = manifest["tokenizer"]["file"]
    print(
        f"{FLAGS.out} is complete: {train['tokens']:,} tokens in {train['documents']:,} documents to train on, "
        f"{validation['tokens']:,} in {validation['documents']:,} to validate on; left out {manifest['empty']:,} empty "
        f"and {manifest['duplicates']:,} duplicates\nto train on it: --config.data.source={FLAGS.out} "
        f"--config.data.tokenizer={Path(FLAGS.out) / file if file else 'bytes'} --config.data.holdout='()'"
    )
