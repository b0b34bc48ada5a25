"""Draw how far the ideal layer is from kernel regression: by modes, by features, and with S4D-Inv for HiPPO-LegS.

idattn plot-ideal --out=docs/ideal.png

It takes seconds. `idattn.evals.ideal` describes every curve.
"""

import matplotlib
from absl import flags
from tqdm import tqdm

from idattn.evals.ideal import error_by_features, error_by_modes, s4d_residual
from idattn.files import resolve_path, write_figure

FLAGS = flags.FLAGS
MODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DELTAS, STATE_MODES = (0.1, 0.01, 0.001), 32


def define_flags() -> None:
    flags.DEFINE_string("out", "docs/ideal.png", "File to write.")


def main(_):
    file = resolve_path(FLAGS.out)  # before anything takes long
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    with tqdm(total=8, desc="curves") as progress:
        for signal, T in (("smooth", 256), ("smooth", 1024), ("noise", 1024)):
            label = f"{signal}, {T:,} tokens"
            axes[0].plot(MODES, error_by_modes(signal, MODES, T=T), marker=".", label=label)
            progress.update()
        for kind in ("positive", "fourier"):
            errors = error_by_features(kind, COUNTS)
            (line,) = axes[1].plot(COUNTS, errors.error, marker=".", label=f"{kind}, error")
            if errors.not_positive.any():
                label = f"{kind}, share of denominators $\\leq$ 0"
                axes[1].plot(COUNTS, errors.not_positive, "--", color=line.get_color(), label=label)
            progress.update()
        for delta in DELTAS:
            residual = s4d_residual(STATE_MODES, delta, LENGTHS)
            axes[2].plot(LENGTHS, residual, marker=".", label=f"$\\Delta$ = {delta}")
            progress.update()
    axes[0].set(title="Numerator: M modes or all of the past", xlabel="M", ylabel="relative error")
    axes[1].set(title="Output: R features or the kernel itself", xlabel="R")
    axes[2].set(title=f"LegS from {STATE_MODES} modes of S4D-Inv", xlabel="tokens so far", ylabel="unexplained part")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[1].legend(fontsize=8, loc="lower left")
    write_figure(file, figure, dpi=80)
