"""Copies the results of finished runs into results/, without the paths of the machine that they ran on.

    python experiments/publish.py RUN_FOLDER... --to results/minilm --model all-MiniLM-L6-v2

Each becomes `TASK-METHOD-seedN.json`: the run's `result.json` as it is, except that the base model is called by its
name where it was a folder, and any other path is cut to its last part.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """The same JSON value with every absolute path replaced by its name, or else by its last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, names) for inner in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return names.get(value, Path(value).name)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of craft-peft train")
    parser.add_argument("--to", required=True, type=Path, help="folder under results/")
    parser.add_argument("--model", required=True, help="name of the base model")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        result = json.loads((run / "result.json").read_text())
        result = without_paths(result, {result["model"]: arguments.model})
        name = f"{result['task']}-{result['method']}-seed{result['seed']}.json"
        (arguments.to / name).write_text(json.dumps(result, indent=1) + "\n")
        print(name, result["score"])


if __name__ == "__main__":
    main()
