"""Synthetic recall made without a network: passkey (RULER S-NIAH-1), phonebook; scores of them and of MQAR.

Prompts are functions of the seed alone, and of the tokenizer where a length is given in tokens; `fingerprint` names
them, so that two results are known to be of the same questions. A prompt is never cut: a length without room for it is
an error.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from idattn.data import Tokenizer, choose
from idattn.evals.scores import continue_texts, progress, score_rows
from idattn.inference import Decoder

# The noise, needle, question and answer prefix are the task that RULER defines (Hsieh et al. 2024, niah_single_1).
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_PASSKEY = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{text}\nWhat is the special magic number for {key} mentioned in the provided text? The "
    "special magic number for {key} mentioned in the provided text is"
)
_PHONEBOOK = "Extract the person's phone number in the phonebook above."
_FIRST = [
    "Alice", "Amir", "Anna", "Boris", "Carmen", "Chen", "Clara", "David", "Elena", "Farid", "Grace", "Hana", "Igor",
    "Ines", "Ivan", "James", "Jonas", "Julia", "Kenji", "Laura", "Leon", "Lucia", "Maria", "Marta", "Nadia", "Nina",
    "Oscar", "Pablo", "Petra", "Rosa", "Ruth", "Samir", "Sara", "Sofia", "Tara", "Tomas", "Vera", "Viktor", "Yuki",
    "Zoe",
]  # fmt: skip
_LAST = [
    "Adams", "Ahmed", "Baker", "Bauer", "Blanc", "Brown", "Costa", "Cruz", "Davis", "Diaz", "Evans", "Fischer",
    "Garcia", "Green", "Haas", "Hill", "Ito", "Jones", "Kaya", "Khan", "Kim", "Kumar", "Lee", "Lopez", "Martin",
    "Meyer", "Moore", "Nagy", "Novak", "Okafor", "Patel", "Popov", "Reed", "Rossi", "Sato", "Silva", "Smith",
    "Tanaka", "Weber", "Young",
]  # fmt: skip
_ADJECTIVES = [
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "idle", "jolly", "keen", "loud",
    "mellow", "narrow", "odd", "pale", "quiet",
]  # fmt: skip
_NOUNS = [
    "anchor", "basket", "candle", "desert", "engine", "feather", "garden", "harbor", "island", "kettle", "lantern",
    "meadow", "orchard", "pebble",
]  # fmt: skip


class Question(NamedTuple):
    """A prompt, and the text that answers it."""

    prompt: str
    answer: str


def passkey(
    tokenizer: Tokenizer, length: int, count: int, *, answer_tokens: int = 128, seed: int = 42
) -> list[Question]:
    """One number among repeated noise, asked for with RULER's answer prefix; the words of keys are other than RULER's.

    Args:
      tokenizer: counts the tokens.
      length: tokens that a prompt with BOS and `answer_tokens` after it fill as far as whole lines of noise do.
      count: questions, each with another key, number and place.
      answer_tokens: room for the answer, 128 in RULER.
      seed: of the choices.

    Raises:
      ValueError: there is no room for a line of noise.
    """
    rng, questions = random.Random(f"passkey {seed}"), []
    for _ in progress(range(count), f"passkey, prompts of {length}", "prompt"):
        key = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
        value, place = str(1_000_000 + int(rng.random() * 9_000_000)), rng.random()

        def prompt(lines: int, key: str = key, value: str = value, place: float = place) -> str:
            text = [_NOISE] * lines
            text.insert(int(place * lines), _NEEDLE.format(key=key, value=value))
            return _PASSKEY.format(text="\n".join(text), key=key)

        def fits(lines: int, prompt: Any = prompt) -> bool:
            return 1 + len(tokenizer.encode(prompt(lines))) + answer_tokens <= length

        if not fits(1):
            least = 1 + len(tokenizer.encode(prompt(1))) + answer_tokens
            raise ValueError(f"{length=} must be at least {least} tokens: those of the shortest prompt and its answer.")
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        questions.append(Question(prompt(low), value))
    return questions


def phonebook(entries: int, count: int, *, seed: int = 42) -> list[Question]:
    """The number of a person in a phone book, after two others as examples (Jelassi et al. 2024, section 4.3).

    Args:
      entries: people in the book, all of other names, 3 to 1600.
      count: questions, each of another book.
      seed: of the choices.

    Raises:
      ValueError: `entries` is out of its range.
    """
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    if not 3 <= entries <= len(names):
        raise ValueError(f"{entries=} must be 3 (two examples and a question) to {len(names)} different names.")
    rng, questions = random.Random(f"phonebook {seed}"), []
    for _ in range(count):
        people = choose(rng, names, entries)
        numbers = [f"{_digits(rng, 3)}-{_digits(rng, 3)}-{_digits(rng, 4)}" for _ in people]
        book = "".join(f"{name}: {number}\n" for name, number in zip(people, numbers, strict=True))
        *examples, asked = choose(rng, list(range(entries)), 3)
        shown = "".join(f"Person: {people[i]}\nNumber: {numbers[i]}\n\n" for i in examples)
        question = f"{_PHONEBOOK}\n\n{shown}Person: {people[asked]}\nNumber:"
        questions.append(Question(f"{book}\n{question}", numbers[asked]))
    return questions


def fingerprint(questions: Sequence[Question] | np.ndarray) -> str:
    """SHA-256 of questions, or of rows of tokens."""
    plain = questions.tolist() if isinstance(questions, np.ndarray) else questions
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def ask(
    decoder: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    num_tokens: int,
    batch_size: int,
    whole: bool = False,
) -> tuple[float, list[str]]:
    """The share of questions that greedy generation answers, and what it wrote.

    Args:
      decoder: the model.
      tokenizer: of the model.
      questions: to be answered.
      num_tokens: to write at most.
      batch_size: questions that are read together, those of like length.
      whole: the answer must be the first line written, but for spaces; otherwise what is written contains it.
    """
    prompts = [question.prompt for question in questions]
    stop = ("\n",) if whole else ()
    written = continue_texts(decoder, tokenizer, prompts, num_tokens, batch_size, temperature=0.0, stop=stop)
    right = [
        text.strip() == question.answer if whole else question.answer in text
        for question, text in zip(questions, written, strict=True)
    ]
    return float(np.mean(right)), written


def mqar_accuracy(decoder: Decoder, tokens: np.ndarray, is_answer: np.ndarray, *, batch_size: int) -> float:
    """The share of the answers of `mqar_rows` that are the most likely token where they stand."""
    best = [is_best for _, is_best in score_rows(decoder, tokens, batch_size, "mqar")]
    return float(np.stack(best)[is_answer].mean())


def _digits(rng: random.Random, count: int) -> str:
    return f"{int(rng.random() * 10**count):0{count}d}"
