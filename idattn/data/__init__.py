"""Text to batches: documents, tokenizers, windows and their order."""

from idattn.data.corpus import Document, load_documents, split
from idattn.data.loader import Batch, TokenWindows, eval_batches, load_data, train_iterator
from idattn.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Document",
    "TokenWindows",
    "Tokenizer",
    "eval_batches",
    "load_data",
    "load_documents",
    "load_tokenizer",
    "split",
    "train_iterator",
]
