"""List the benchmarks, or run all of them in turn with `python -m benchmarks all`."""

import importlib
import pkgutil
import sys

import benchmarks

NAMES = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]

if __name__ == "__main__":
    if sys.argv[1:] != ["all"]:
        print("python -m benchmarks.NAME, or `python -m benchmarks all`:")
        for name in NAMES:
            doc = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
            print(f"  {name:24s} {doc.strip().splitlines()[0] if doc.strip() else ''}")
    else:
        for name in NAMES:
            print(f"== {name}")
            importlib.import_module(f"benchmarks.{name}").main()
