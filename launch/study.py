"""`python -m launch.study`: the program `idattn study`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("study")
