"""`python -m launch.plot_kernel`: the program `idattn plot-kernel`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("plot-kernel")
