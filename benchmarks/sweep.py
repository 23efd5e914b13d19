"""What the runner of sweeps costs: to plan 200 runs that are finished, and to start the process of one run.

    python benchmarks/sweep.py --output results/performance/sweep-cpu.json
    python benchmarks/sweep.py --quick              # few runs: that the script runs

The runs are folders as `craft-peft train` leaves them, with the result of one real run in each. A plan is made as
`craft-peft sweep` makes it: the file read, every folder looked at, the state of every run decided, and its table made.
A start is from the moment a run is asked for to the first line of its own code; "process" imports everything, "fork"
comes from a process that has.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pairs import Seconds, take_turns, write
from transformers import BertConfig

from craft_peft.glue.results import FORMAT
from craft_peft.glue.runs import FORMAT as RUN_FORMAT
from craft_peft.glue.sweep.commands import Command, run_command
from craft_peft.glue.sweep.counts import Counts
from craft_peft.glue.sweep.executors import JOB
from craft_peft.glue.sweep.experiment import read_experiment
from craft_peft.glue.sweep.forked import fork_server, run_forked
from craft_peft.glue.sweep.plan import Plan
from craft_peft.glue.sweep.runner import FINISHED, Sweep
from craft_peft.glue.sweep.store import COUNTS, Store
from craft_peft.glue.sweep.table import plan_table

PROJECT = Path(__file__).resolve().parent.parent
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
METHODS = ("craft", "lora", "lora-xs", "lotr", "head")
TOML = "model = {model}\nseeds = {seeds}\nbudget = 600\ntasks = {{{tasks}}}\nmethods = {{{methods}}}\n"
START = """import sys, time
import craft_peft.glue.sweep.job

def main(words):
    print(time.time())
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def make_sweep(folder: Path) -> Sweep:
    """As the command makes it."""
    experiment = read_experiment(folder / "many.toml")
    plan = Plan(experiment, Counts(experiment.model, folder / "runs" / COUNTS))
    return Sweep(plan, Store(folder / "runs", folder / "results"))


def finish_all(folder: Path, seeds: int) -> int:
    """Writes an experiment and a finished run for each of its cells; how many."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(**sizes).save_pretrained(folder / "encoder")
    tasks, methods = (", ".join(f"{name} = {{}}" for name in names) for names in (TASKS, METHODS))
    model = json.dumps(str(folder / "encoder"))
    text = TOML.format(model=model, seeds=list(range(seeds)), tasks=tasks, methods=methods)
    (folder / "many.toml").write_text(text)
    result = json.loads(next((PROJECT / "results" / "default_recipe").glob("*-craft-*.json")).read_text())
    sweep = make_sweep(folder)
    for cell in sweep.cells:
        planned = sweep.plan.decide(cell, {})
        assert planned is not None
        run = folder / "runs" / planned.name
        run.mkdir(parents=True)
        metadata = {"format": RUN_FORMAT, "settings": planned.settings, "task": {}, "files": []}
        (run / "run.json").write_text(json.dumps(metadata))
        own = {"format": FORMAT, "task": cell.task, "method": cell.method, "seed": cell.seed}
        (run / "result.json").write_text(json.dumps({**result, **own}))
    sweep.plan.counts.save()
    make_sweep(folder).publish()
    return len(sweep.cells)


def plan(folder: Path) -> None:
    """What `craft-peft sweep` does before the first run, when there is none left to do."""
    sweep = make_sweep(folder)
    assert {sweep.state(cell) for cell in sweep.cells} == {FINISHED}
    plan_table(sweep)


def start_seconds(folder: Path, rounds: int) -> Seconds:
    """Seconds until the first line of a run's code, both ways."""
    module = "sweep_start"
    (folder / f"{module}.py").write_text(START)
    sys.path.insert(0, str(folder))
    forks = fork_server(JOB)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    seconds: Seconds = {}
    for number in range(-1, rounds):  # the first fork waits for the imports, once
        for way in ("process", "fork") if forks is not None else ("process",):
            command = Command(("-m", module, ""), folder / f"{way}{number}", environment, folder, module)
            start = time.time()
            ended = run_forked(forks, command) if forks is not None and way == "fork" else run_command(command)
            assert ended.status == 0, command.log.read_text()
            if number >= 0:
                seconds.setdefault(way, []).append(float(command.log.read_text().split()[-1]) - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 runs, one round")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = finish_all(folder, seeds=1 if arguments.quick else 5)
        planning = take_turns({"plan": lambda: plan(folder)}, rounds)["plan"]
        starts = start_seconds(folder, rounds)
    figures = {"runs": runs, "plan_seconds": planning, "start_seconds": starts}
    print(f"plan of {runs} finished runs: {statistics.median(planning):.2f} s")
    for way, seconds in starts.items():
        print(f"start of a run, {way}: {statistics.median(seconds):.2f} s")
    write(arguments.output, figures)


if __name__ == "__main__":
    main()
