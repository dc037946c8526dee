"""Evaluate a checkpoint on the task suite and on benchmarks: the code is in sphinx_pl/cli/evaluate.py."""

if __name__ == "__main__":
    from sphinx_pl.cli.evaluate import main

    main()
elif __name__ == "evaluate":  # `import evaluate` means Hugging Face's package, in this folder too
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("evaluate", [path for path in sys.path if Path(path or ".").resolve() != here])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("no package 'evaluate' is installed")
    sys.modules["evaluate"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
