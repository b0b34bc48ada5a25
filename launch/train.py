"""`python -m launch.train`: the program `idattn train`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("train")
