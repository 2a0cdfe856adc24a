"""How processes end, seen from outside, as test_endings.py wants.

    python endings.py TIMES
prints the threads that a rank has left after training under ZeRO, then the exit codes of two ranks, TIMES times.
What is slow, the imports, is done once, and each ending is a fork's. A thread gets Python's lock only where its holder
lets go of it, so that one which still wants it at the end finds none: two of five such endings aborted.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
sys.path.append(str(Path(__file__).parents[1] / "support"))

import torch
import toys
from torch import distributed as dist

from slicetune.engine.common import distributed
from slicetune.engine.slices.ffn import attach


def threads_after_training() -> None:
    """DeepSpeed is imported here, when there is a group, as in a run."""
    distributed.start(3)
    with tempfile.TemporaryDirectory() as out:
        train(Path(out))
    distributed.stop()
    left = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    print("threads", *sorted(left), flush=True)


def train(out: Path) -> None:
    model = toys.model()
    attach(model, toys.neurons())
    toys.trained(model, toys.config(str(out), train_epochs=1), toys.examples(10), out)


def one_rank(number: int, port: int) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(3)
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD  # as an engine leaves a group of all ranks
    sys.setswitchinterval(10)
    for _ in range(2):
        distributed.share_object("the results are whole")
    distributed.stop()


def both_ranks() -> list[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for number in range(2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            one_rank(number, port)
            sys.exit()
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


def main(times: int) -> None:
    torch.set_num_threads(1)
    if (child := os.fork()) == 0:
        threads_after_training()
        sys.exit()
    os.waitpid(child, 0)
    import deepspeed  # noqa: F401

    for _ in range(times):
        print("codes", *both_ranks(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
