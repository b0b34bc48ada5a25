"""`python -m launch.generate`: the program `idattn generate`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("generate")
