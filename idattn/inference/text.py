"""Text in, text out: prompts are encoded, what is written is shown as it comes and ends at stop strings."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from idattn.data.tokenizer import Tokenizer
from idattn.inference.decoder import Context, Decoder
from idattn.ops.segments import PADDING

_BORDERS = ("a", ".", "0", "\n")  # texts of different kinds: a token that starts in one of them does not go past it


class Completion(NamedTuple):
    """What was written after one prompt.

    Attributes:
      text: without the stop string.
      tokens: (n,) int32, with the tokens of the stop string, or the stop token.
      finish: "stop" or "length".
    """

    text: str
    tokens: np.ndarray
    finish: str


def generate(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    num_tokens: int,
    *,
    context: Context | None = None,
    stop_tokens: Sequence[int] = (),
    on_block: Callable[[np.ndarray], np.ndarray | None] | None = None,
    **sampling: Any,
) -> list[np.ndarray]:
    """Continue prompts of tokens, all in one batch.

    Args:
      decoder: the model.
      prompts: of each row, (T,) integers of any length; at least one token if there is no context.
      num_tokens: to write at most, at least 1.
      context: what every prompt follows, of one row or one for each prompt; it stays valid. Then prompts may be empty.
      stop_tokens: a row ends after the first of these that it writes.
      on_block: called with every block of tokens (B, n), -1 after a row's end; it may return rows (B,) bool to end.
      **sampling: settings of `idattn.inference.sampling.make_sampling`.

    Returns:
      The tokens that each row has written, int32.

    Raises:
      ValueError: an argument is out of its range.
    """
    if num_tokens < 1:
        raise ValueError(f"{num_tokens=} must be at least 1.")
    rows, longest = len(prompts), max(map(len, prompts), default=0)
    settings = decoder.sampling(rows, **sampling)  # before anything takes long
    if context is not None:
        context = decoder.fork(context, [0] * rows if context.length.shape[0] == 1 else range(rows))
    if context is None or longest:
        tokens, lengths = right_pad(prompts)
        context = decoder.prefill(tokens, lengths, context, max_tokens=longest + num_tokens)
    active, blocks, left = np.ones(rows, bool), [], num_tokens
    while left and active.any():
        count = min(left, decoder.block_size)
        block, context, active = decoder.decode(
            context, settings, num_tokens=count, active=active, stop_tokens=stop_tokens
        )
        blocks.append(block)
        left -= count
        ended = on_block(block) if on_block else None
        active = active if ended is None else active & ~ended
    written = np.concatenate(blocks, axis=1)
    return [row[row != PADDING] for row in written]


def right_pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as (B, T) int32, padded at the right, and their lengths (B,)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max(initial=0)), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, continues: bool = False) -> np.ndarray:
    """The tokens of a prompt: BOS and those of its text, or those of its text alone where it continues another.

    Tokenizers such as Llama 2's put a space before every text that they encode. A continuation has no such space: it is
    encoded after a short text, whose tokens are then removed.

    Args:
      tokenizer: of the model.
      prompt: the text.
      continues: whether other text comes before it.

    Returns:
      (n,) int32.

    Raises:
      ValueError: the tokenizer joins the beginning of a continuation with every text that could come before it.
    """
    if not continues:
        return np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    if not prompt:
        return np.zeros(0, np.int32)
    for border in _BORDERS:
        before, both = tokenizer.encode(border), tokenizer.encode(border + prompt)
        if 0 < len(before) < len(both) and np.array_equal(both[: len(before)], before):
            return both[len(before) :].astype(np.int32)
    raise ValueError(f"{prompt[:40]!r} cannot be encoded as a continuation; give all of the text without a context.")


def generate_text(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    context: Context | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Continue texts, each from the start of a document or from a context.

    Only ids of the tokenizer's vocabulary, which the model's may exceed, are sampled.

    Args:
      decoder: as in `generate`, like `num_tokens` and `context`.
      tokenizer: of the model.
      prompts: one text for each row; an empty one starts a document.
      stop: a row ends before the first of these texts that it writes, however it is divided into tokens.
      on_text: called after every block with each row and what came to its text, which may be nothing.
      **options: `stop_tokens`, and settings of `idattn.inference.sampling.make_sampling`.

    Raises:
      ValueError: an argument is out of its range.
    """
    if any(not text for text in stop):
        raise ValueError(f"stop={list(stop)} must not hold an empty text, which every text ends with.")
    continues = context is not None
    encoded = [encode_prompt(tokenizer, prompt, continues=continues) for prompt in prompts]
    border = tokenizer.encode(_BORDERS[0]) if continues else ()  # stands for the text of the context
    streams = [TextStream(tokenizer, stop, [*border, *tokens]) for tokens in encoded]

    def on_block(block: np.ndarray) -> np.ndarray:
        for row, (stream, tokens) in enumerate(zip(streams, block, strict=True)):
            text = stream.add(tokens[tokens != PADDING])
            if on_text:
                on_text(row, text)
        return np.array([stream.stopped for stream in streams])

    options["num_ids"] = tokenizer.vocab_size
    written = generate(decoder, encoded, num_tokens, context=context, on_block=on_block, **options)
    completions = []
    for row, (stream, tokens) in enumerate(zip(streams, written, strict=True)):
        if (text := stream.end()) and on_text:
            on_text(row, text)
        ended = stream.stopped or (tokens.size and tokens[-1] in options.get("stop_tokens", ()))
        completions.append(Completion(stream.text, tokens[: stream.used], "stop" if ended else "length"))
    return completions


class TextStream:
    """The text of a row as its tokens come: whole characters, nothing that may be the beginning of a stop string.

    Args:
      tokenizer: decodes.
      stop: strings to stop at.
      before: tokens that come before, by which some tokenizers decode the first one.

    Attributes:
      text: what was released.
      stopped: whether a stop string was complete; then nothing more is released.
      used: tokens up to there, all if there was none.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] | np.ndarray = ()):
        self.text, self.stopped, self.used = "", False, 0
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = [int(token) for token in before[-8:]]  # of the last two pieces of text
        self._known = len(self._tokens)  # of them, those of the first piece
        self._held = ""  # may begin a stop string

    def add(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text that these tokens release."""
        released = ""
        for token in tokens:
            if self.stopped:
                break
            self._tokens.append(int(token))
            self.used += 1
            before = self._tokenizer.decode(self._tokens[: self._known])
            piece = self._tokenizer.decode(self._tokens)[len(before) :]
            if piece and not piece.endswith("\ufffd"):  # an incomplete character
                self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
                released += self._release(piece)
        return released

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._tokens[: self._known])
        rest = self._release(self._tokenizer.decode(self._tokens)[len(before) :])
        held, self._held = self._held, ""
        self.text += held
        return rest + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:  # the one that was complete first, however the text was divided
            self.stopped, self._held = True, ""
            text = text[: min(matches)[1]]
        else:
            longest = min(max(map(len, self._stop), default=1) - 1, len(text))
            held = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text
