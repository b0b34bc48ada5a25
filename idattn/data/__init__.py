"""Text to batches: documents, tokenizers, prepared folders, windows and their order."""

from idattn.data.batch import ARRAYS, Batch
from idattn.data.corpus import Corpus, load_documents, split
from idattn.data.loader import (
    TokenWindows,
    count_epochs,
    digests,
    eval_batches,
    load_data,
    load_stream,
    train_iterator,
)
from idattn.data.preparation import Preparation, prepare
from idattn.data.recall import choose, mqar_rows
from idattn.data.sources import Document
from idattn.data.stream import TokenStream, read_manifest, verify
from idattn.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "ARRAYS",
    "Batch",
    "Corpus",
    "Document",
    "Preparation",
    "TokenStream",
    "TokenWindows",
    "Tokenizer",
    "choose",
    "count_epochs",
    "digests",
    "eval_batches",
    "load_data",
    "load_documents",
    "load_stream",
    "load_tokenizer",
    "mqar_rows",
    "prepare",
    "read_manifest",
    "save_tokenizer",
    "split",
    "train_iterator",
    "train_tokenizer",
    "verify",
]
