"""`python -m launch.aot`: the program `idattn plan`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("plan")
