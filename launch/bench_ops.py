"""`python -m launch.bench_ops`: the program `idattn bench-ops`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("bench-ops")
