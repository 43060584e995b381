"""The verb `ctrsink score`: a small file at once, or requests of any number block by block."""

import argparse
import os
from typing import Any

from ctrsink import terminal
from ctrsink.cli_arguments import add_verb, count
from ctrsink.errors import InputError

BLOCK_BYTES = 4 << 20


def add_score_verb(verbs: Any) -> None:
    """Add it to the parser's `verbs`."""
    scored = "click probabilities for requests: of a file at once, or by blocks into a folder"
    score = add_verb(verbs, "score", _score, scored, quiet=True)
    score.add_argument("--model", required=True, metavar="DIR", help="that `ctrsink export` wrote; local or s3://, as all places")
    score.add_argument("--base", metavar="DIR", help="of an adapter; default: where it says, or the Hugging Face cache")
    score.add_argument(
        "--input", required=True, metavar="PLACE", help="a file, a folder, or a pattern in quotes: jsonl (also .gz) or Parquet"
    )
    score.add_argument(
        "--output", metavar="PLACE", help="a file (default: stdout), or a folder, whose name ends in / or is there"
    )
    score.add_argument(
        "--on-bad-request", choices=["fail", "skip"], default="fail", help="skip: its line of the output says what is wrong"
    )
    score.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    blocks = score.add_argument_group(
        "by blocks",
        "into a folder, in bounded memory, going on where it was interrupted: of a folder, a pattern, Parquet or .gz",
    )
    blocks.add_argument("--parts", choices=["parquet", "jsonl"], help="of the output (default: as the first file of the input)")
    blocks.add_argument("--block-bytes", type=count, default=BLOCK_BYTES, metavar="N", help="of a part (default: 4 MiB)")
    blocks.add_argument("--on", choices=["process", "ray"], default="process", help="this process, or actors of Ray Data")
    blocks.add_argument("--workers", type=count, metavar="N", help="actors (default: one a core of this machine; 1 on a cluster)")
    blocks.add_argument("--cpus-per-worker", type=count, default=1, metavar="N", help="threads of an actor (default: 1)")
    blocks.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: RAY_ADDRESS, else one is started)")


def _score(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.request_lines import read_lines, require_model
    from ctrsink.scoring.files import is_folder, is_one_plain_file

    output = args.output
    to_folder = args.parts is not None or args.on == "ray" or (output is not None and (output.endswith("/") or is_folder(output)))
    if to_folder or not is_one_plain_file(args.input):
        return _by_blocks(args)
    lines = read_lines(args.input, args.on_bad_request)
    require_model(args.model)
    from ctrsink.serve.lines import score_lines

    counts = score_lines(args.model, lines, output, args.on_bad_request, args.device, args.base)
    if output is not None or args.json:
        return counts
    print(", ".join(f"{key}: {value}" for key, value in counts.items()), file=terminal.err())  # stdout is the scores'
    return {}


def _by_blocks(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.request_lines import require_model
    from ctrsink.runtime.score import score_here, score_on_ray
    from ctrsink.scoring.files import request_files
    from ctrsink.scoring.job import ScoreJob

    if args.output is None:
        raise InputError(f"{args.input} is scored by blocks, into a folder: give --output DIR/")
    form = args.parts or request_files(args.input)[0].kind
    require_model(args.model)
    job = ScoreJob(
        args.model, args.input, args.output.rstrip("/"), form, args.on_bad_request, args.block_bytes, args.device, args.base
    )
    if args.on == "process":
        found = score_here(job)
    else:
        joined = args.address or os.environ.get("RAY_ADDRESS")
        workers = args.workers or (1 if joined else max(1, (os.cpu_count() or 1) // args.cpus_per_worker))
        found = score_on_ray(job, args.address, workers, args.cpus_per_worker)
    return found | {"output": args.output}
