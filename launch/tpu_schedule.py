"""`python -m launch.tpu_schedule`: the program `idattn schedule`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("schedule")
