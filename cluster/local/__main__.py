"""`python -m cluster.local`: several hosts on this machine, to try what happens when one of them fails."""

import argparse
import os
import shlex
import signal
import sys

from cluster.local.hosts import BUCKET, JOBS, Hosts
from ctrsink.errors import InputError, RunError


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 good, 1 something did not start, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="local", help="of the hosts, where several such clusters run (default: %(default)s)")
    parser = argparse.ArgumentParser("python -m cluster.local", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    up = verbs.add_parser("up", parents=[common], help="start a Ray head, an S3 server and hosts; needs root and iproute2")
    up.add_argument("--hosts", type=int, default=2, help="hosts that work (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=1, help="of each host (default: %(default)s)")
    up.add_argument("--detach", action="store_true", help="return once all is ready, instead of ending it all with Ctrl-C")
    up.set_defaults(command=_up)
    add = verbs.add_parser("add", parents=[common], help="start one more host")
    add.set_defaults(command=lambda args: _add(Hosts.of(args.name)))
    down = verbs.add_parser("down", parents=[common], help="end and remove everything, also after a crash")
    down.set_defaults(command=lambda args: Hosts.of(args.name).down() or 0)
    for verb, act, text in (
        ("cut", Hosts.cut, "cut a host's link"),
        ("mend", Hosts.mend, "mend it; the host joins again by itself"),
        ("kill", Hosts.kill, "end all of a host at once, as if its power failed"),
    ):
        one = verbs.add_parser(verb, parents=[common], help=text)
        one.add_argument("host")
        one.set_defaults(command=lambda args, act=act: act(Hosts.of(args.name), args.host) or 0)
    announce = verbs.add_parser(
        "announce", parents=[common], help="tell Ray that a host will be taken away; kill it yourself afterwards"
    )
    announce.add_argument("host")
    announce.add_argument("--seconds", type=int, default=60, help="until then (default: %(default)s)")
    announce.set_defaults(command=lambda args: Hosts.of(args.name).announce(args.host, args.seconds) or 0)
    within = verbs.add_parser("exec", parents=[common], help="run a program on a host, such as `ray job submit` on the head")
    within.add_argument("host")
    within.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM")
    within.set_defaults(command=_exec)
    return parser


def _up(args: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    hosts = Hosts.up(args.name, args.hosts, args.cpus)
    try:
        for host, address in sorted(hosts.addresses().items()):
            print(f"# {host:8} {address}")
        print(f"# job server {JOBS}, bucket s3://{BUCKET}, logs in {hosts.folder}")
        print(f"# These addresses exist inside alone: python -m cluster.local exec --name {args.name} head -- PROGRAM")
        for name, value in hosts.exports().items():
            print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        while not args.detach:
            signal.pause()
    except BaseException:
        hosts.down()
        raise
    return 0


def _add(hosts: Hosts) -> int:
    host = hosts.add()
    print(host, hosts.addresses()[host])
    return 0


def _exec(args: argparse.Namespace) -> int:
    program = args.program[1:] if args.program[:1] == ["--"] else args.program  # a later one belongs to the program
    if not program:
        raise InputError("exec: say what to run, after --")
    hosts = Hosts.of(args.name)
    with hosts.inside(args.host):
        try:
            os.execvpe(program[0], program, hosts.environment())
        except FileNotFoundError:
            raise InputError(f"no program {program[0]} on the path") from None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
