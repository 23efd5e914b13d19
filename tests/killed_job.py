"""A run whose process, or the one that started it, is killed once: what `test_executors` gives as the module of a run.

The environment says when: `KILL` is "parent:6" for the process that started this one, at the sixth step, or "self:6";
`KILL_MARKER` is a file that says that it happened.
"""

import json
import os
import sys
from pathlib import Path

from tiny_sweep import DieOnce

from craft_peft.glue.sweep.job import end_with_parent, run_job


def main(words):
    end_with_parent()
    who, _, step = os.environ["KILL"].partition(":")
    pid = os.getppid() if who == "parent" else os.getpid()
    return run_job(json.loads(words[0]), callbacks=[DieOnce(int(step), Path(os.environ["KILL_MARKER"]), pid)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
