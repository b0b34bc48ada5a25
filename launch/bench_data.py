"""`python -m launch.bench_data`: the program `idattn bench-data`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("bench-data")
