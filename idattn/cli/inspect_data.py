"""Show what prepare-data made, and verify every checksum of it.

idattn inspect-data DIR [--sample_tokens=400]

Prints the manifest, a histogram of the documents' lengths and decoded text in which document borders are marked; exits
with 1 if a shard or record is damaged. A shard that is deleted is made again by the command that prepared the folder.
"""

import sys

import numpy as np
from absl import flags
from tqdm import tqdm

from idattn.data import TokenStream, load_tokenizer, read_manifest, verify
from idattn.files import disk_path

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer("sample_tokens", 400, "Tokens of each split to decode, from its beginning.")


def main(arguments):
    if len(arguments) != 2:
        raise ValueError("Give the folder to inspect.")
    folder = disk_path(arguments[1])
    manifest = read_manifest(folder)
    for name, value in manifest.items():
        if name != "splits":
            print(f"{name:<14}{value}")
    shards = sum(len(split["shards"]) for split in manifest["splits"].values())
    reports = list(tqdm(verify(folder), total=shards, unit="shard", desc="verify"))
    file = manifest["tokenizer"]["file"]
    tokenizer = load_tokenizer(str(folder / file) if file else "bytes")
    problems = [report.problem for report in reports if report.problem]
    for name, split in manifest["splits"].items():
        print(
            f"\n{name}: {split['tokens']:,} tokens in {split['documents']:,} documents, {len(split['shards'])} shards"
        )
        lengths = [report.lengths for report in reports if report.split == name]
        if lengths:
            print_histogram(np.concatenate(lengths))
        if lengths and not problems:
            print(f"\n{sample(TokenStream(folder, name)[: FLAGS.sample_tokens], tokenizer)}")
    print("\n" + "\n".join(problems or [f"{shards} shards verified"]))
    sys.exit(1 if problems else 0)


def print_histogram(lengths: np.ndarray) -> None:
    """Documents and tokens by length, in powers of two."""
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    for power in np.unique(powers):
        chosen = lengths[powers == power]
        bar = "#" * round(40 * len(chosen) / len(lengths))
        print(f"  {2**power:>10,} tokens and more  {len(chosen):>10,} documents  {chosen.sum():>14,} tokens  {bar}")


def sample(tokens: np.ndarray, tokenizer) -> str:
    """Decoded text, every document after a line that shows its border."""
    borders = np.flatnonzero(tokens == tokenizer.bos_id)
    documents = np.split(tokens, borders)[1:]
    return "".join(
        f"--- document of the split number {n} ---\n{tokenizer.decode(ids)}\n" for n, ids in enumerate(documents)
    )
