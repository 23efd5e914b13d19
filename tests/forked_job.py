"""What `test_executors` gives as the module of a run: says what it was given, or waits for its end, told to a pipe."""

import atexit
import os
import signal
import stat
import sys

import torch


def main(words):
    if os.path.exists(words[0]):
        from craft_peft.glue.sweep.job import end_with_parent

        end_with_parent()
        with open(words[0], "w") as told:
            print("here", file=told, flush=True)
            signal.pause()
    atexit.register(print, "finished")
    pipe = "pipe" if stat.S_ISFIFO(os.fstat(0).st_mode) else "no pipe"
    print(words[0], os.environ["OUTER"], torch.get_num_threads(), pipe)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
