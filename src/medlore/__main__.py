"""`python -m medlore` is the `medlore` command."""

from medlore.cli import run

if __name__ == "__main__":
    run()
