"""Verbs of the command line for jobs on a Ray cluster: `submit`, and `jobs` for what was submitted."""

import argparse
import os
from typing import Any

from ctrsink.cli_arguments import add_verb, configured
from ctrsink.text_table import aligned


def add_job_verbs(verbs: Any) -> None:
    """Add `submit` and `jobs status|logs|stop|list`."""
    submit = add_verb(verbs, "submit", _submit, "run `train` as a job on a Ray cluster and follow it")
    configured(submit)
    _addressed(submit)
    submit.add_argument(
        "--working-dir", default=".", metavar="DIR", help="folder that is sent to the cluster; holds the configuration"
    )
    submit.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in run_dir, if there is one")
    submit.add_argument(
        "--submission-id", metavar="ID", help="of the job: a second submit of the same work follows the first; default: a new one"
    )
    submit.add_argument("--detach", action="store_true", help="return as soon as the cluster has taken the job")
    submit.add_argument("--dry-run", action="store_true", help="show every file that would be sent, and send nothing")
    submit.add_argument("--allow-unauthenticated", action="store_true", help="take a cluster that asks for no token")

    jobs = verbs.add_parser("jobs", help="look after jobs on a Ray cluster").add_subparsers(required=True, metavar="VERB")
    _addressed(add_verb(jobs, "list", _list, "every job that the cluster knows, the newest first"))
    for name, run, text in (
        ("status", _status, "what is known of a job"),
        ("logs", _logs, "print the log of a job"),
        ("stop", _stop, "end a job at once; `ctrsink stop --run RUN_DIR` has a run save itself first"),
    ):
        verb = add_verb(jobs, name, run, text)
        verb.add_argument("job", metavar="ID")
        _addressed(verb)
        if name == "logs":
            verb.add_argument("--follow", action="store_true", help="to the end of the job; fails where the job fails")


def _addressed(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("RAY_API_SERVER_ADDRESS")
    parser.add_argument("--address", default=default, help="of the cluster's job server, http://...")


def _submit(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.submit import submit

    given = {name: getattr(args, name) for name in ("submission_id", "detach", "dry_run", "allow_unauthenticated")}
    done = submit(args.config, args.overrides, args.address, args.working_dir, args.resume, **given)
    if not args.json:
        done.pop("left_out", None)  # told on stderr
    return done


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.jobs import list_jobs

    found = list_jobs(args.address)
    if args.json:
        return {"jobs": found}
    columns = ("job", "status", "started", "ended", "run_dir")
    print(aligned([columns, *([row[name] for name in columns] for row in found)], left=len(columns)))
    return {}


def _status(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.jobs import job_status

    return job_status(args.address, args.job)


def _logs(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.jobs import job_logs

    status = job_logs(args.address, args.job, args.follow)
    return {"job": args.job, "status": status.value} if args.json else {}


def _stop(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.jobs import stop_job

    return stop_job(args.address, args.job)
