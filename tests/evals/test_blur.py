"""w(i, j), responses and timescales against the literal recurrence, and what is read and drawn of whole models."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from support import oracles
from support.helpers import assert_close, defined_flags, random_case, random_linear_case, run_main
from support.models import run_of

from idattn.cli import plot_kernel
from idattn.config import ComputeConfig, ModelConfig
from idattn.evals.blur import blur_kernel, impulse_response, read_layers, resolution, timescales
from idattn.inference import save_weights
from idattn.nn import LanguageModel
from idattn.ops import Basis

T, G, M = 7, 2, 5
MIXERS = ("interdomain", "softmax", "s4d")


def basis_of(case):
    c = (case["c_re"], case["c_im"]) if "c_re" in case else None
    return Basis(case["log_delta"], case["a_log"], case["a_imag"], c)


def literal_kernel(case, readout):
    """w(i, j): what the last token reads where one token has a key, and one a value."""
    one = np.eye(T)[:, ::-1]  # row i: token T - 1 - i
    k = np.repeat(one, T, axis=0)[..., None, None] * np.ones((G, 1))
    v = np.tile(one, (T, 1))[..., None, None] * np.ones((G, 1))
    o, _ = oracles.forward(case | {"q": np.ones_like(k), "k": k, "v": v}, readout)
    return o[:, -1, :, 0].T.reshape(G, T, T)


def literal_response(case):
    """h(i): the output i tokens after the only input."""
    z = np.eye(T)[:1, :, None, None] * np.ones((G, 1))
    return oracles.linear_forward(case | {"z": z})[0][0, :, :, 0].T


@pytest.mark.parametrize(
    ("c", "readout"), [("full", "transpose"), ("full", "hermitian"), ("diagonal", "real"), ("identity", "hermitian")]
)
def test_kernel(c, readout):
    case = random_case(np.random.default_rng(0), B=1, T=T, H=G, G=G, R=1, E=1, M=M, c=c, initial_state=False)
    with jax.enable_x64(True):
        assert_close(blur_kernel(basis_of(case), T, readout), literal_kernel(case, readout), "float64", reduction=M**2)


def test_response_and_timescales():
    case = random_linear_case(np.random.default_rng(1), B=1, T=T, H=G, W=2, M=M, initial_state=False)
    with jax.enable_x64(True):
        assert_close(
            impulse_response(basis_of(case), case["c_out"], T), literal_response(case), "float64", reduction=M**2
        )
        half_life, frequency = map(np.asarray, timescales(basis_of(case)))
    lam, _ = oracles.discretize(case)
    assert_close(0.5 ** (1 / half_life), np.abs(lam), "float64", reduction=M)
    assert_close(2 * np.pi * frequency, np.abs(np.angle(lam)), "float64", reduction=100)  # phases of up to 20


def test_resolution():
    """Of one real mode, lambda = r: shares (1 - r^2) r^(2 j) whatever i; of a delta, of a constant, and of nothing."""
    decay = np.array([1.0, 0.5, 0.1])
    zero = np.zeros(3)
    with jax.enable_x64(True):
        w = blur_kernel(Basis(zero, np.log(decay)[:, None], zero[:, None], None), 300)
    p = np.exp(-2 * decay)
    head = resolution(w)
    for values, expected in ((head.centre, p / (1 - p)), (head.width, np.sqrt(p) / (1 - p))):
        assert_close(values, np.tile(expected[:, None], 300), "float64", reduction=300**2)
    assert_close(head.strength, np.exp(-decay[:, None] * np.arange(300)), "float64", reduction=300)
    assert (np.diff(head.width[:, 0]) > 0).all()  # a mode that forgets sooner resolves more

    centre, width, strength = resolution(np.stack([np.eye(8), np.ones((8, 8)), np.diag([1.0, 0, 0, 0, 0, 0, 0, 0])]))
    np.testing.assert_allclose(centre[:2], [np.arange(8), np.full(8, 3.5)])
    np.testing.assert_allclose(width[:2], [np.zeros(8), np.full(8, np.sqrt(63 / 12))])
    assert (strength == [np.ones(8), np.ones(8), np.eye(8)[0]]).all()
    assert np.isnan(centre[2]).tolist() == np.isnan(width[2]).tolist() == [False] + [True] * 7


@pytest.fixture(scope="module")
def run():
    """Config and parameters of a hybrid of two times three layers, of another seed than the config's."""
    model = ModelConfig.tiny(*MIXERS, num_layers=6)
    config = dataclasses.replace(run_of(model), compute=ComputeConfig(dtype="float32"))
    made = nnx.jit(lambda: LanguageModel(model, config.compute, rngs=nnx.Rngs(0)))()
    return config, nnx.to_pure_dict(nnx.state(made, nnx.Param))


def test_layers_of_a_model(run):
    config, params = run
    layers = read_layers(config, params, T)
    assert [(layer.layer, layer.mixer) for layer in layers] == [(n, MIXERS[n % 3]) for n in (0, 2, 3, 5)]
    for layer in layers:
        repeat, place = divmod(layer.layer, 3)
        core = params["groups"][f"block_{place}"]["mixer"]["core"]
        case = {name: np.asarray(x[repeat], np.float64) for name, x in core["basis"].items()}
        case["c_re"], case["c_im"] = case.pop("c")
        if layer.mixer == "s4d":
            expected = literal_response(case | {"c_out": np.asarray(core["c_out"][repeat])})
        else:
            expected = literal_kernel(case, "transpose")
        assert_close(layer.weights, expected, "float32", reduction=M**2)
        lam, _ = oracles.discretize(case)
        assert_close(0.5 ** (1 / layer.half_life), np.abs(lam), "float32", reduction=M)
        assert_close(layer.frequency, np.abs(np.angle(lam)) / (2 * np.pi), "float32", reduction=M)
    started = read_layers(dataclasses.replace(config, seed=0), None, T)
    for layer, same in zip(layers, started, strict=True):
        assert_close(same.weights, layer.weights, "float32", reduction=M**2)


def test_refusals(run):
    config, _ = run
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        read_layers(config, None, 0)
    softmax = dataclasses.replace(config, model=ModelConfig.tiny("softmax"))
    with pytest.raises(ValueError, match=r"mixers=\('softmax',\) have no SSM among them, such as interdomain"):
        read_layers(softmax, None, T)


def test_plot_kernel(run, tmp_path, capsys):
    config, params = run
    save_weights(tmp_path / "export", config, params, 9)
    picture, file = tmp_path / "new" / "learned.png", tmp_path / "new" / "learned.json"
    arguments = [f"--out={picture}", f"--json={file}", f"--length={T}"]
    with defined_flags(plot_kernel):
        run_main(plot_kernel, f"--checkpoint={tmp_path / 'export'}", *arguments)
        assert picture.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="--json needs a --checkpoint"):
            run_main(plot_kernel, *arguments)
        run_main(plot_kernel, f"--out={tmp_path / 'start.png'}", f"--length={T}")
        assert (tmp_path / "start.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads(file.read_text())
    assert stored["step"] == 9
    layers = read_layers(config, params, T)
    for row, layer in zip(stored["trained"], layers, strict=True):
        assert (row["layer"], row["mixer"]) == (layer.layer, layer.mixer)
        values = resolution(layer.weights)._asdict() if layer.mixer == "interdomain" else {"response": layer.weights}
        for name, expected in (values | {"half_life": layer.half_life}).items():
            np.testing.assert_allclose(row[name], expected, rtol=1e-4)
    assert stored["start"][0]["half_life"] != stored["trained"][0]["half_life"]
    lines = capsys.readouterr().out.splitlines()
    width = np.median(resolution(layers[0].weights).width[:, 0])
    assert lines[3].split()[:2] == ["0", "interdomain"] and f"-> {width:>5.1f} " in lines[3]
    assert lines[4].split()[:2] == ["2", "s4d"] and "->" not in lines[4]
