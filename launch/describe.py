"""`python -m launch.describe`: the program `idattn describe`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("describe")
