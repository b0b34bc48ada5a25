"""Draw w(i, j), the weight with which a key i tokens ago passes its score on to the value j tokens ago.

python -m launch.plot_kernel --out=docs/kernel.png

Plain linear attention is w(i, j) = [i = j]. Here the basis of one head as it starts (S4D-Inv, C the identity, hermitian
readout), M = 64, for three step sizes.
"""

import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags

from idattn.ops import Basis
from idattn.ops.chunks import make_tables

OUT = flags.DEFINE_string("out", "docs/kernel.png", "File to write.")
DELTAS, M, K = (0.1, 0.03, 0.01), 64, 128


def main(_):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n = np.arange(M)
    a_imag = jnp.asarray(M / np.pi * (M / (2 * n + 1) - 1), jnp.float32)
    one = jnp.ones((len(DELTAS), 1), jnp.float32)
    basis = Basis(jnp.log(jnp.asarray(DELTAS)), np.log(0.5) * one * jnp.ones(M), one * a_imag, None)
    tables = make_tables(basis, K, "hermitian")
    w = jnp.einsum("gim,gjm->gij", tables.spread, tables.lags)
    figure, axes = plt.subplots(1, len(DELTAS), figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, delta, weights in zip(axes, DELTAS, np.asarray(w), strict=True):
        scale = np.abs(weights).max()
        image = axis.imshow(weights / scale, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower")
        axis.set(title=f"$\\Delta$ = {delta}", xlabel="j, tokens since the value")
    axes[0].set_ylabel("i, tokens since the key")
    figure.colorbar(image, label="w(i, j), largest = 1")
    figure.savefig(OUT.value, dpi=80)


if __name__ == "__main__":
    app.run(main)
