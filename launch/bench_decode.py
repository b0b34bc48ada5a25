"""`python -m launch.bench_decode`: the program `idattn bench-decode`, in the repository."""

from idattn.cli import run

if __name__ == "__main__":
    run("bench-decode")
