"""What `ctrsink serve` runs with: the model, what it takes of a request, how many wait, and what it writes down."""

from pydantic import Field

from ctrsink.config.base import Section


class LimitsSpec(Section):
    """What one request may hold; more of it is answered with 413 or 422 before the model sees it."""

    body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Bytes of a request's body."""
    body_seconds: float = Field(default=10.0, gt=0)
    """Until the body has arrived; a slower client is answered with 408."""
    reading_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Of all bodies that are being read at a time; beyond it 503."""
    history: int = Field(default=2000, ge=0)
    """Behaviours of a request."""
    candidates: int = Field(default=1000, ge=1)
    """Candidates of a request."""
    text: int = Field(default=8192, ge=1)
    """Characters of each text in a request, keys included."""


class QueueSpec(Section):
    """What may wait for the model; a request beyond it is answered with 503 at once."""

    requests: int = Field(default=256, ge=1)
    """Accepted and not answered yet."""
    tokens: int = Field(default=2_000_000, ge=1)
    """Of the encoded requests that wait for the model."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Requests that wait go to the model together as long as they have no more tokens than this; one alone may have more."""
    deadline_ms: float = Field(default=2000.0, gt=0)
    """Until the model begins on a request, from when its body is here; a request's header `X-Deadline-Ms` says otherwise."""
    encoders: int = Field(default=2, ge=1, le=64)
    """Threads that check requests and turn them into tokens."""


class CacheSpec(Section):
    """What each model that is held keeps between requests; see docs/serving.md."""

    history_bytes: int = Field(default=256 * 2**20, ge=0)
    """Of users' histories; 0: none is kept. Models that cannot continue a kept history say so in the log."""
    sinks_only: bool = False
    """Keep of a history only what candidates read, where they read its sinks alone: less, but one that grew is computed anew."""
    items: int = Field(default=100_000, ge=0)
    """Whose tokens and vectors are kept."""


class RequestLogSpec(Section):
    """A sample of what was asked and answered, as Parquet that `ctrsink data served` turns into a log to train on."""

    to: str | None = None
    """Folder, local or s3://; null: nothing is written."""
    share: float = Field(default=0.01, gt=0, le=1)
    """Of the users, all of whose requests are written; of the requests, where a request names no user."""
    rows: int = Field(default=200_000, ge=1)
    """Behaviours and candidates in a file of events, about."""
    seconds: float = Field(default=300.0, gt=0)
    """After which a file is written, however few there are."""


class ServeSpec(Section):
    """A service; `ctrsink serve` has an option for the first of these, and takes all others as `section.key=value`."""

    model: str
    """Folder of an exported model, local or s3://; or a pointer: a file whose one line names that folder, by itself or
    relative to the file, or a link to it. A pointer is watched, and where it leads is taken into use
    without a pause."""
    device: str = "cpu"
    """As PyTorch names it: `cpu`, `cuda`, `cuda:1`."""
    base: str | None = None
    """Local folder of the base of models that are adapters; null: where each says, or the Hugging Face cache."""
    watch_seconds: float = Field(default=2.0, gt=0)
    """Between two looks at the pointer."""
    drain_seconds: float = Field(default=2.0, ge=0)
    """After SIGTERM for which requests are still taken, while /health/ready says no: what balances the load needs a moment."""
    limits: LimitsSpec = LimitsSpec()
    queue: QueueSpec = QueueSpec()
    cache: CacheSpec = CacheSpec()
    log: RequestLogSpec = RequestLogSpec()
