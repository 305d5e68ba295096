"""What a flag names in a file: "FILE.py:NAME"."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.config import ROOT


def load_named(spec: str, flag: str, kind: type = object) -> Any:
    """What "FILE.py:NAME" names; FILE is looked for in the working folder, then in this project."""
    file, _, name = spec.rpartition(":")
    paths = [path for path in (Path(file), ROOT / file) if path.suffix == ".py" and path.is_file()]
    if not paths:
        raise ValueError(f"{flag}: got {spec!r}, expected FILE.py:NAME of a file that is there")
    path = paths[0].resolve()
    if path.parent == ROOT:  # a program of this project, which must not be loaded twice
        module = importlib.import_module(path.stem)
    else:
        module_spec = importlib.util.spec_from_file_location(f"_named_{path.stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses look their module up there
        module_spec.loader.exec_module(module)
    if name not in vars(module):
        raise ValueError(f"{flag} {spec}: got no {name} in {path}, expected it there")
    value = vars(module)[name]
    if not isinstance(value, kind):
        raise ValueError(f"{flag} {spec}: got {value!r}, expected a {kind.__name__}")
    return value


def load_scorer(spec: str, flag: str) -> Callable[[list], list[float]]:
    """The function that "FILE.py:NAME" names; it must return one finite number for each item."""
    function = load_named(spec, flag, Callable)

    def scorer(items: list) -> list[float]:
        result = function(items)
        try:
            numbers = [float(number) for number in result]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(items) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{flag} {spec}: got {str(result)[:200]} for {len(items)} items, "
                             "expected one finite number for each")
        return numbers

    return scorer
