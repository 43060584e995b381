"""A request that is not scored: the status and the one sentence that its client gets."""

import math


class Refused(Exception):
    """Args:
    status: of HTTP.
    reason: one sentence that says what to do.
    kind: a word for the metrics, of requests that were shed.
    retry_after: seconds after which it may go better.
    """

    def __init__(self, status: int, reason: str, kind: str = "", retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.kind = status, reason, kind
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        if status in (408, 413):  # what is left of the body is not waited for
            self.headers["Connection"] = "close"


def shed(reason: str, kind: str, retry_after: float = 1.0) -> Refused:
    """503: the service has more to do than it can, or goes away."""
    return Refused(503, reason, kind, retry_after)
