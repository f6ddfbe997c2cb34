"""What is measured, beside its target; `python -m benchmarks NAME` measures one subject again, `all` every one in turn.

python -m benchmarks              the tables that are kept, with every target beside its figure
python -m benchmarks list         the benchmarks and what they measure
python -m benchmarks growth       one of them, with its own flags
python -m benchmarks page         write docs/performance.md from the tables that are kept
python -m benchmarks all          all of them in turn: hours
"""

import importlib
import pkgutil
import sys

import benchmarks
from benchmarks import _figures

NAMES = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]


def run(name: str) -> None:
    """Run one benchmark; a package that is missing is named, and nothing else is lost."""
    try:
        module = importlib.import_module(f"benchmarks.{name}")
        sys.argv[0] = str(module.__file__)
        module.main()
    except ModuleNotFoundError as error:
        print(f"{name} is left out: {error.name} is not installed; pip install {error.name}", file=sys.stderr)


def main(words: list[str]) -> None:
    """What the words ask for."""
    match words:
        case []:
            print(_figures.summary())
        case ["list"]:
            for name in NAMES:
                doc = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
                print(f"  {name:24s} {doc.strip().splitlines()[0] if doc.strip() else ''}")
        case ["page"]:
            _figures.write_page()
        case ["all"]:
            for name in NAMES:
                print(f"== {name}")
                sys.argv = ["benchmarks"]
                run(name)
        case [name, *_] if name in NAMES:
            sys.argv = ["benchmarks", *words[1:]]
            run(name)
        case _:
            sys.exit(f"{' '.join(words)}: unknown. Accepted: list, page, all, {', '.join(NAMES)}")


if __name__ == "__main__":
    main(sys.argv[1:])
