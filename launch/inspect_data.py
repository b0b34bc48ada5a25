"""`python -m launch.inspect_data`: the program `idattn inspect-data`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("inspect-data")
