"""`python -m launch.export`: the program `idattn export`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("export")
