"""Results as ablation.measure wrote them, each with the pictures that it is about."""

import json
from pathlib import Path
from typing import Any

from ablation.runs import Found, Measured
from ablation.scores import score

Result = dict[str, Any]


def read(folder: Path) -> dict[str, Result]:
    """Name of a result, such as clip_half-300 -> its content and that of its split's pictures."""
    pictures = {path.stem: json.loads(path.read_bytes()) for path in folder.glob("pictures_*.json")}
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem in pictures:
            continue
        result = json.loads(path.read_bytes())
        of_split = pictures.get(name := f"pictures_{result['split']}")
        if of_split is None:
            raise SystemExit(f"{folder / name}.json: no such file beside {path.name}; ablation.measure writes both")
        if result["data"] != of_split["data"]:
            raise SystemExit(f"{path}: measured on other data than {name}.json; remove it, train again")
        found[path.stem] = of_split | result
    return found


def found_in(folder: Path) -> Found:
    """What the rules of stages.py read of the results in a folder."""
    return Found({name: Measured(score(result), result["cpu_s"]) for name, result in read(folder).items()})
