"""The verb `ctrsink serve`."""

import argparse
import ipaddress
import os
from typing import Any

from ctrsink.cli_arguments import add_verb, count, share
from ctrsink.errors import InputError


def add_serve_verb(verbs: Any) -> None:
    """Add it to the parser's `verbs`."""
    serve = add_verb(verbs, "serve", _serve, "answer requests over HTTP with an exported model")
    serve.add_argument("--model", required=True, metavar="DIR|POINTER", help="folder, or a file that names it and is watched")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, help="default: 8000; 0 takes a free one")
    serve.add_argument("--replicas", type=count, default=1, metavar="N", help="under Ray Serve, each with a model of its own")
    serve.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: cpu)")
    serve.add_argument("--plain", action="store_true", help="one process without Ray")
    serve.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster to run on; default: one that is started here")
    serve.add_argument("--log-requests", metavar="URI", help="folder for a sample of requests and scores, local or s3://")
    serve.add_argument("--log-share", type=share, metavar="S", help="of the users whose requests are logged (default: 0.01)")
    serve.add_argument("--allow-unauthenticated", action="store_true", help="listen beyond this machine although no token is set")
    serve.add_argument("overrides", nargs="*", metavar="section.key=value", help="see docs/serving.md")


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.config import load_serve

    if args.log_share is not None and args.log_requests is None:
        raise InputError("--log-share is the share of what --log-requests writes down: give both")
    log = {"to": args.log_requests} | ({} if args.log_share is None else {"share": args.log_share})
    spec = load_serve({"model": args.model, "device": args.device, "log": log}, args.overrides)
    if args.plain and (args.replicas > 1 or args.address):
        raise InputError("--plain is one process: leave out --replicas and --address, or --plain")
    _require_token(args.host, args.allow_unauthenticated)
    from ctrsink.serve.pointer import resolve

    resolve(spec.model)
    try:
        if args.plain:
            from ctrsink.serve.plain import serve_plain

            return serve_plain(spec, args.host, args.port)
        from ctrsink.runtime.process import stay_on_loopback

        stay_on_loopback(args.address)
        from ctrsink.runtime.serve import serve_ray
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'ctrsink[serve]'") from None
    return serve_ray(spec, args.host, args.port, args.replicas, args.address)


def _require_token(host: str, allowed: bool) -> None:
    """Refuse to listen beyond this machine where everybody would be answered."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not allowed and not os.environ.get("CTRSINK_SERVE_TOKEN"):
        raise InputError(
            f"--host {host} can be reached from elsewhere and no token is set: set CTRSINK_SERVE_TOKEN, or say "
            "--allow-unauthenticated where something before it keeps strangers out"
        )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a number up to 65535")
    return int(text)
