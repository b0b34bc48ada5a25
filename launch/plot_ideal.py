"""`python -m launch.plot_ideal`: the program `idattn plot-ideal`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("plot-ideal")
