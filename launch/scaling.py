"""`python -m launch.scaling`: the program `idattn scaling`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("scaling")
