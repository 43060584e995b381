"""The processes of test_flight: `python -m tests.flight_ranks RANK STORE PLACE`; the second does not come to the third sum."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

TIMEOUT_S = 2


def main(rank: int, store: str, place: str) -> None:
    from ctrsink.runtime import flight

    os.environ.update(flight.recording(Path(place)))
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    for _ in range(2):
        dist.all_reduce(torch.ones(3))
    failed = None
    try:
        if rank == 1:
            time.sleep(TIMEOUT_S + 1)
        else:
            dist.all_reduce(torch.ones(3))
    except RuntimeError as error:
        failed = type(error).__name__
    flight.leave(rank)
    print(json.dumps({"failed": failed}), flush=True)
    os._exit(0)  # as a worker that is ended: no goodbye to the others


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:4])
