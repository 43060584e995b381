"""The processes of test_failing_ranks: `python -m tests.failing_ranks FAILURE RANK STORE DATA FOLDER`; the second rank fails."""

import os
import sys
import time
from datetime import timedelta
from typing import Any

TIMEOUT_S = 8
FAILS_AT = 12
"""Forward passes of the second rank before it fails."""


def main(failure: str, rank: int, store: str, data: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, 1)
    import torch.distributed as dist

    from ctrsink.config import parse_run
    from ctrsink.dist import Topology
    from ctrsink.runtime import preflight
    from ctrsink.train.engine import Engine
    from ctrsink.train.loop import Trainer
    from tests.runs import run_tree

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    forward, passes = Engine.forward, iter(range(1000))

    def failing(self: Engine, *args: Any) -> Any:
        if rank == 1 and next(passes) == FAILS_AT:
            if failure == "hang":
                time.sleep(3 * TIMEOUT_S)
            raise ZeroDivisionError("nothing to divide by")
        return forward(self, *args)

    Engine.forward = failing
    spec = parse_run(run_tree(data, folder, runtime={"kind": "ray", "workers": 2}, train={"checkpoint_every": 4}), "test")
    facts = preflight.check(spec)
    began = time.monotonic()
    try:
        Trainer(spec, Topology(rank, 2), facts).run()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        print(f"{time.monotonic() - began:.1f}", flush=True)
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:6])
