"""`python -m launch.prepare_data`: the program `idattn prepare-data`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("prepare-data")
