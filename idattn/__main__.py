"""`python -m idattn NAME --flags`: the command `idattn` of this interpreter."""

from idattn.cli import main

if __name__ == "__main__":
    main()
