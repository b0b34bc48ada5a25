"""The posterior variance against Gaussian conditioning written out, and what a model's rows and correlations are."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from scipy import stats
from support import oracles
from support.helpers import assert_close, random_case
from support.models import make_model, next_log_probs, run_of

from idattn.config import ModelConfig, SSMConfig
from idattn.evals import posterior, tasks
from idattn.evals.posterior import ROUNDING, calibration, correlate, measure, posterior_variance
from idattn.nn.readout import QueryReadout
from idattn.ops import Basis

NOISE = 0.3  # of the model's values
WELL_RESOLVED = int(1 / ROUNDING**2)  # a solution loses as many digits as the largest condition of Phi Phi^T has


def literal_variance(case, noise):
    """(B, T, H): the joint covariance of f(q_t) and of what the state has of values v_s = f(k_s) + e_s, conditioned."""
    lam, beta = oracles.discretize(case)
    q, k = case["q"], case["k"]
    B, T, H, _ = q.shape
    G = k.shape[2]
    result = np.zeros((B, T, H))
    for b, t, h in np.ndindex(B, T, H):
        g = h // (H // G)
        keys, query = k[b, : t + 1, g], q[b, t, h]
        response = beta[g][:, None] * lam[g][:, None] ** np.arange(t, -1, -1)
        phi = np.concatenate([response.real, response.imag])  # (2M, t + 1)
        prior = 1 / np.mean(np.sum(keys**2, -1))
        of_values = prior * keys @ keys.T + noise * np.eye(t + 1)
        observed = phi @ of_values @ phi.T + noise * ROUNDING * np.sum(phi**2) * np.eye(len(phi))
        cross = prior * phi @ keys @ query
        result[b, t, h] = 1 - cross @ np.linalg.solve(observed, cross) / (prior * query @ query)
    return result


def basis_of(case):
    return Basis(case["log_delta"], case["a_log"], case["a_imag"], None)


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_variance(noise):
    """From the first token to more than twice as many as the 2M numbers that a state has."""
    case = random_case(np.random.default_rng(0), B=3, T=23, H=4, G=2, R=3, E=1, M=5, c="identity", initial_state=False)
    expected = literal_variance(case, noise)
    assert 0 < expected.min() < expected.max() < 1
    with jax.enable_x64(True):
        actual = posterior_variance(case["q"], case["k"], basis_of(case), noise)
        assert_close(actual, expected, "float64", reduction=WELL_RESOLVED)
    single = jax.tree.map(jnp.float32, (case["q"], case["k"], basis_of(case)))
    assert_close(posterior_variance(*single, noise), expected, "float32", reduction=10_000)


def test_keys_in_the_state_and_not():
    """Eight keys, one a token, then another for long: what was written, never written, and written and forgotten."""
    M, R, T = 16, 12, 400
    basis = Basis(jnp.zeros(1), jnp.full((1, M), -3.0), 2 * np.pi * jnp.arange(M)[None] / M, None)
    k = np.eye(R, dtype=np.float32)[np.minimum(np.arange(T), 8)]
    q = np.zeros((3, T, R), np.float32)
    q[0, :, 3], q[1, :, 10], q[2] = 1, 1, (0.6 * np.eye(R)[3] + 0.8 * np.eye(R)[10])
    keys = np.broadcast_to(k[None, :, None], (3, T, 1, R))
    stored, absent, both = np.asarray(posterior_variance(q[:, :, None], keys, basis, 0.01))[..., 0]
    np.testing.assert_allclose(stored[:3], 1, rtol=1e-5)
    np.testing.assert_allclose(absent, 1, rtol=1e-5)
    assert stored[3] == stored[:20].min() < 0.02 and stored[8] < 0.05
    assert stored[-1] > 0.9, "the state forgets, as a cache of all keys would not"
    np.testing.assert_allclose(both, 0.36 * stored + 0.64 * absent, rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    return make_model("softmax", "interdomain", num_layers=4, vocab_size=257)


@pytest.fixture(scope="module")
def values(model):
    tokens = np.random.default_rng(0).integers(0, 20, (11, 16)).astype(np.int32)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return tokens, measure(run_of(model.config), params, tokens, 4, NOISE)


def test_rows(model, values):
    """Losses and entropies are the model's, in batches that one row does not fill; counts are those of the rows."""
    tokens, measured = values
    names = ["loss", "layer 1", "layer 3", "all", "position", "frequency", "target frequency", "entropy"]
    assert list(measured) == names
    for i, row in enumerate(tokens):
        log_probs = next_log_probs(model, row)[:-1]
        assert_close(measured["loss"][i], -log_probs[np.arange(15), row[1:]], "float32", reduction=257)
        assert_close(measured["entropy"][i], stats.entropy(np.exp(log_probs), axis=-1), "float32", reduction=257)
    assert_close(measured["all"], (measured["layer 1"] + measured["layer 3"]) / 2, "float32")
    assert measured["position"].tolist() == [list(range(15))] * 11
    for name, part in (("frequency", tokens[:, :-1]), ("target frequency", tokens[:, 1:])):
        assert measured[name].tolist() == [[int((tokens == x).sum()) for x in row] for row in part]


def test_variances_of_layers(model, values, monkeypatch):
    """They are those of the queries and keys that the layers' op is called with."""
    tokens, measured = values
    calls, attend = [], QueryReadout.attend

    def spy(self, q, k, v, basis, *rest):
        jax.debug.callback(lambda *x: calls.append(jax.tree.map(np.asarray, x)), q, k, basis, ordered=True)
        return attend(self, q, k, v, basis, *rest)

    monkeypatch.setattr(QueryReadout, "attend", spy)
    jax.block_until_ready(nnx.jit(lambda model: model(tokens))(model))
    jax.effects_barrier()
    for name, (q, k, basis) in zip(("layer 1", "layer 3"), calls, strict=True):
        expected = np.log(literal_variance({"q": q, "k": k} | basis._asdict(), NOISE)).mean(-1)[:, :-1]
        assert_close(measured[name], expected, "float32", reduction=10_000)


def test_correlations():
    """Those of scipy, partial ones by regression of ranks, and the error of a bootstrap that resamples rows."""
    rng = np.random.default_rng(0)
    names = ("loss", "layer 0", "all", "position", "frequency", "target frequency", "entropy")
    common = rng.normal(size=(40, 1))  # tokens of a row are alike, so that rows count and not tokens
    values = {name: rng.normal(size=(40, 25)).round(1) + common for name in names}
    values["position"] = np.broadcast_to(np.arange(25), (40, 25))
    results = correlate(values, 0)
    given = [f"{name} given {label}" for label in posterior.CONTROL_SETS for name in ("layer 0", "all")]
    assert list(results) == [*names[1:], *given]
    for name in names[1:]:
        expected = stats.spearmanr(values[name], values["loss"], axis=None).statistic
        assert_close(results[name][0], expected, "float64", reduction=1000)
    ranks = {name: stats.rankdata(x).ravel() for name, x in values.items()}
    design = np.stack([*(ranks[name] for name in names[3:]), np.ones(1000)], -1)
    residuals = [y - design @ np.linalg.lstsq(design, y)[0] for y in (ranks["layer 0"], ranks["loss"])]
    expected = np.corrcoef(*residuals)[0, 1]
    assert_close(results["layer 0 given these and entropy"][0], expected, "float64", reduction=1_000_000)
    rho, error, (low, high) = results["layer 0"]
    again = rng.integers(0, 40, (400, 40))
    drawn = [stats.spearmanr(values["layer 0"][i], values["loss"][i], axis=None).statistic for i in again]
    assert low < rho < high and error == pytest.approx(np.std(drawn), rel=0.2)
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.05)
    assert results == correlate(values, 0) != correlate(values, 1)


def test_calibration():
    rng = np.random.default_rng(1)
    variance = rng.normal(size=(30, 10))
    loss = variance**2 + rng.normal(size=(30, 1))
    curve = calibration(variance, loss, 0)
    parts = np.argsort(variance, axis=None).reshape(10, 30)
    assert_close(curve["loss"], loss.ravel()[parts].mean(1), "float64", reduction=30)
    assert_close(curve["variance"], np.exp(variance.ravel()[parts].mean(1)), "float64", reduction=30)
    assert (np.array(curve["low"]) < curve["loss"]).all() and (np.array(curve["high"]) > curve["loss"]).all()
    assert 0.3 < np.mean(np.subtract(curve["high"], curve["low"])) < 2  # rows differ by 1, and a bin has some 20


def test_task(model, values, tmp_path, monkeypatch):
    """It measures whole rows of every source, of the trained length and within max_tokens, and draws the result."""
    calls, streams = [], np.random.default_rng(2).integers(0, 257, (2, 200))
    windows = [SimpleNamespace(stream=stream) for stream in streams]
    monkeypatch.setattr(tasks, "load_data", lambda *_: (None, None, windows))
    monkeypatch.setattr(posterior, "measure", lambda *x: calls.append(x) or values[1])
    config = run_of(model.config)
    settings = tasks.Settings(max_tokens=170, batch_tokens=40, noise=0.5, figures=epath.Path(tmp_path))
    result = tasks.run_task("posterior", tasks.Subject(config, "params", None, None), settings)
    ((*start, rows, batch_size, noise),) = calls
    assert (*start, batch_size, noise) == (config, "params", 2, 0.5)
    np.testing.assert_array_equal(rows, streams[:, :160].reshape(20, 16))
    assert result["tokens"] == 320 and [*result["curves"]] == ["layer 1", "layer 3", "all"]
    expected = correlate(values[1], settings.seed)
    assert {
        name: (result["metrics"][name], result["errors"][name], result["intervals"][name]) for name in expected
    } == (expected)
    assert result["curves"]["all"] == calibration(values[1]["all"], values[1]["loss"], settings.seed)
    assert (tmp_path / "posterior.png").read_bytes().startswith(b"\x89PNG")


def test_errors(model):
    config, rows = run_of(model.config), np.zeros((1, 16), np.int32)
    with pytest.raises(ValueError, match="1 rows of 16 tokens must be at least 10"):
        measure(config, None, rows, 1, 1.0)
    for mixer, ssm in (("s4d", SSMConfig()), ("interdomain", SSMConfig(core="clock"))):
        other = dataclasses.replace(config, model=ModelConfig.tiny(mixer, ssm=ssm))
        with pytest.raises(ValueError, match=r"no posterior variance, which needs queries that read a state of fixed"):
            measure(other, None, rows, 1, 1.0)
    with pytest.raises(ValueError, match=r"noise=0\.0 must be above 0"):
        tasks.Settings(noise=0.0)
