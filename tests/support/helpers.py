"""What the tests share: the one tolerance table, and seeded random cases that are hard but fair."""

import contextlib

import numpy as np
from absl import flags

# Largest error of one rounding relative to max|expected|; a sum of n terms may err sqrt(n) times as much, and a
# gradient 4 times that.
TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 4e-3}
PADDING = -1


def assert_close(
    actual, expected, dtype: str, *, reduction: int = 1, gradient: bool = False, name: str = "array"
) -> float:
    """Assert that max|actual - expected| <= bound * max|expected|, or <= bound where expected is all zeros.

    Args:
      actual: array of any float dtype; its shape must be that of expected.
      expected: the trusted array.
      dtype: "float64", "float32" or "bfloat16": the precision that actual was computed in.
      reduction: natural length of the sums that make one element.
      gradient: whether actual is a cotangent.
      name: what the message calls the array.

    Returns:
      error / bound, at most 1.

    Raises:
      AssertionError: shapes differ, the error exceeds the bound, or anything is NaN or infinite.
    """
    actual, expected = (np.asarray(x).astype(complex if np.iscomplexobj(x) else float) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    bound = TOLERANCE[dtype] * np.sqrt(reduction) * (4 if gradient else 1)
    if expected.size == 0:
        return 0.0
    error = np.max(np.abs(actual - expected)) / (np.max(np.abs(expected)) or 1.0)
    assert error <= bound, (
        f"{name}: relative error {error:.3e} exceeds {bound:.3e}, {error / bound:.3g} times the bound"
    )
    return float(error / bound)


def random_case(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    H: int,
    G: int,
    R: int,
    E: int,
    M: int,
    c: str = "full",
    initial_state: bool = True,
    fast_phase: float = 20.0,
) -> dict[str, np.ndarray]:
    """Float64 inputs of interdomain attention under the names of oracles.Case.

    Rows of q, k and v have norms near 1. Every head has decays per step from 1e-4 to 50, log-uniform and stratified
    over its modes; phases per step reach pi, and fast_phase in the mode that forgets fastest.

    Args:
      c: "full", "diagonal" or "identity".
      initial_state: whether the case has one (of the size that states have).
      fast_phase: largest phase per step, in radians.
    """
    delta = np.exp(rng.uniform(np.log(0.05), np.log(0.2), (G, 1)))
    stratum = np.argsort(rng.random((G, M)), axis=1)
    decay = 1e-4 * (50 / 1e-4) ** ((stratum + rng.random((G, M))) / M)
    phase = rng.uniform(-1, 1, (G, M)) * np.where(stratum == M - 1, fast_phase, np.pi)
    case = {
        "q": rng.normal(size=(B, T, H, R)) / np.sqrt(R),
        "k": rng.normal(size=(B, T, G, R)) / np.sqrt(R),
        "v": rng.normal(size=(B, T, G, E)) / np.sqrt(E),
        "log_delta": np.log(delta[:, 0]),
        "a_log": np.log(decay / delta),
        "a_imag": phase / delta,
    }
    if c != "identity":
        shape = {"full": (G, M, M), "diagonal": (G, M)}[c]
        scale = np.sqrt(0.5 / M) if c == "full" else np.sqrt(0.5)
        case |= {"c_re": scale * rng.normal(size=shape), "c_im": scale * rng.normal(size=shape)}
    if initial_state:
        case["initial_state"] = 0.1 * rng.normal(size=(B, G, R + E, 2 * M))
    return case


def random_linear_case(
    rng: np.random.Generator, *, B: int, T: int, H: int, W: int, M: int, **options
) -> dict[str, np.ndarray]:
    """Float64 inputs of the linear readout under the names of oracles.Case; random_case with G = H and z of width W."""
    case = random_case(rng, B=B, T=T, H=H, G=H, R=1, E=W - 1, M=M, **options)
    case["z"] = np.concatenate([case.pop("k"), case.pop("v")], axis=-1)
    del case["q"]
    case["c_out"] = rng.normal(size=(H, M)) / np.sqrt(M)
    return case


def random_segments(rng: np.random.Generator, T: int) -> np.ndarray:
    """One row of ids (T,): runs of 1 to 5 tokens of padding or of one of two documents, so that ids come back."""
    runs = [np.full(rng.integers(1, 6), rng.integers(PADDING, 2)) for _ in range(T)]
    return np.concatenate(runs)[:T].astype(np.int32)


def segment_rows(T: int, K: int) -> dict[str, np.ndarray]:
    """Rows of segment ids (T,) that cover the corners: documents, ids that come back, and padding everywhere."""
    t = np.arange(T)
    return {
        "ids that come back": np.where(t % 5 < 3, 4, 2),
        "resets at chunk borders": t // K,
        "padding in the middle": np.where((t >= T // 3) & (t < T // 3 + K), PADDING, 7),
        "padding at the left": np.where(t < (T + 1) // 2, PADDING, 3),
        "nothing but padding": np.full(T, PADDING),
        "padding at the right": np.where(t > (T - 1) // 2, PADDING, 3),
        "padding over a chunk border": np.where((t >= K - 1) & (t <= K), PADDING, t // (K + 1)),
        "a reset at the first and last token of a chunk": np.where((t == K) | (t == 2 * K - 1), 1, 0),
        "one document": np.zeros(T),
    }


def segment_batches(T: int, K: int, B: int) -> list[np.ndarray]:
    """The rows of segment_rows in batches (B, T), int32; the last batch repeats rows where B does not divide."""
    rows = np.stack(list(segment_rows(T, K).values())).astype(np.int32)
    return [np.take(rows, range(start, start + B), axis=0, mode="wrap") for start in range(0, len(rows), B)]


def with_nan_padding(case: dict[str, np.ndarray], segment_ids: np.ndarray) -> dict[str, np.ndarray]:
    """The case with NaN in the tokens that are padding."""
    padding = (segment_ids == PADDING)[:, :, None, None]
    return {name: np.where(padding, np.nan, x) if name in ("q", "k", "v", "z") else x for name, x in case.items()}


@contextlib.contextmanager
def defined_flags(module):
    """The flags of an entry point, which another one that runs in this process may define too."""
    before = set(flags.FLAGS)
    module.define_flags()
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def run_main(module, *arguments):
    """Run an entry point whose flags are defined with the arguments of a command line."""
    flags.FLAGS([module.__name__, *arguments])
    try:
        module.main(None)
    finally:
        flags.FLAGS.unparse_flags()
