"""`python -m launch.evaluate`: the program `idattn evaluate`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("evaluate")
