"""What a run says of itself: a progress line, metrics.jsonl, TensorBoard, MLflow and gauges, all from the first rank."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ctrsink import storage, strict_json
from ctrsink.config import RunSpec
from ctrsink.errors import InputError, RunError
from ctrsink.families.protocol import Flops
from ctrsink.run.folder import BOARD_NAME, METRICS_NAME, flatten
from ctrsink.sequences.batch import Batch
from ctrsink.train.observe.mlflow_run import MlflowRun

log = logging.getLogger("ctrsink.train")
APPEND_S, UPLOAD_S = 5.0, 60.0
"""Least time between two flushes."""


class Telemetry:
    """Collects rows of metrics and appends them to the run's metrics.jsonl: each is written once, however many there are.

    Nothing appends to an object of S3: there the file grows in a local folder, with TensorBoard's, and is uploaded whole now and
    then, so that uploads take a twentieth of the time at most. A checkpoint waits for the rows before it, so that none is missing
    in a run that is resumed.

    Args:
        spec: the run; its folder is local or s3://.
        step: optimiser steps that the run continues from; rows of later steps, written before it was cut off, are dropped.
        gauges: see HostHooks.

    Raises:
        InputError: MLflow is asked for and not installed.
    """

    def __init__(self, spec: RunSpec, step: int, gauges: Callable[[dict[str, Any]], None] | None = None) -> None:
        run_dir = spec.run_dir
        self._gauges = gauges
        self._mlflow: MlflowRun | None = None
        if spec.train.mlflow is not None:
            self._mlflow = MlflowRun(spec.train.mlflow, run_dir, spec.name, flatten(spec.model_dump(mode="json")))
        self._run_dir, self._remote = run_dir, storage.is_remote(run_dir)
        self._folder = tempfile.mkdtemp(prefix="ctrsink-metrics-") if self._remote else run_dir
        self._path = storage.join(self._folder, METRICS_NAME)
        self._board = SummaryWriter(storage.join(self._folder, BOARD_NAME), purge_step=step + 1 if step else None)
        self._board_failed = False
        self._size = 0  # of the file, as far as it is known to be written
        self._new = _until(step, run_dir) if step else b""
        self._behind = False  # whether S3 lacks something of it
        self._pause = UPLOAD_S if self._remote else APPEND_S
        self._flushed = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._rows: list[str] = []
        self._flush: Future[None] = Future()
        self._flush.set_result(None)

    def add(self, row: dict[str, Any]) -> None:
        """Record a row; it has the keys `step` and `stage`. Flushed every five seconds at most, on S3 every minute."""
        self._rows.append(strict_json.dumps(row) + "\n")
        with self._board_may_fail():
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["step"])
        if self._gauges is not None:
            self._gauges(row)
        if self._mlflow is not None:
            self._mlflow.add(row)
        if time.monotonic() - self._flushed > self._pause and self._flush.done():
            self.flush()

    def flush(self) -> "Future[None]":
        """Write the rows since the last time, in a thread of its own: a slow storage does not hold the training up.

        A storage that fails is tried again at the next flush and does not end the training; what comes back never raises.
        """
        self._flushed = time.monotonic()
        self._flush = self._thread.submit(self._write, "".join(self._rows).encode())
        self._rows = []
        return self._flush

    def _write(self, rows: bytes) -> None:
        """In the thread: `rows` and those that could not be written before."""
        self._new += rows
        if not self._new and not self._size:  # of a run that never made a step nothing is to be left
            return
        with self._board_may_fail():
            self._board.flush()
        try:
            if self._new:
                if self._size:
                    storage.append(self._path, self._new, self._size)
                else:  # what an attempt before left there may have rows of later steps
                    storage.write_bytes(self._path, self._new)
                self._size, self._new, self._behind = self._size + len(self._new), b"", self._remote
            if self._behind:
                began = time.monotonic()
                storage.upload_dir(self._folder, self._run_dir)
                self._behind, self._pause = False, max(UPLOAD_S, 20 * (time.monotonic() - began))
        except (InputError, RunError, OSError) as error:
            log.warning("metrics are not written, they are tried again with the next ones: %s", error)

    @contextmanager
    def _board_may_fail(self) -> Generator[None, None, None]:
        """TensorBoard raises the failure of its own thread again at every later call: it is told of once."""
        try:
            yield
        except OSError as error:
            if not self._board_failed:
                log.warning("TensorBoard's files are not written: %s", error)
            self._board_failed = True

    def close(self, finished: bool) -> None:
        """Write everything; `finished`: the run is at its end, nothing will go on with it."""
        self.flush().result()
        self._thread.shutdown()
        if self._mlflow is not None:
            self._mlflow.close(finished)
        with self._board_may_fail():
            self._board.close()
        if self._remote:
            shutil.rmtree(self._folder, ignore_errors=True)


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; none where there is no such file.

    Raises:
        InputError: a row is damaged.
    """
    rows = []
    for number, line in enumerate(_lines(run_dir), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{storage.join(run_dir, METRICS_NAME)}, line {number} is damaged: take that line out") from None
    return rows


def _until(step: int, run_dir: str) -> bytes:
    """The rows of a run up to that step, as they were written."""
    lines = _lines(run_dir)
    while lines and json.loads(lines[-1])["step"] > step:  # steps ascend: few lines are looked at
        lines.pop()
    return b"".join(line + b"\n" for line in lines)


def _lines(run_dir: str) -> list[bytes]:
    """Those of metrics.jsonl that are whole: the last one may have been cut off, or be on its way."""
    try:
        return storage.read_bytes(storage.join(run_dir, METRICS_NAME)).split(b"\n")[:-1]
    except FileNotFoundError:
        return []


class Pace:
    """Rates since the last report: impressions/s, tokens/s, TFLOP/s, share of time that waited for data.

    Args:
        flops: counts what the model needs for a batch, with what is trained now.
    """

    def __init__(self, flops: Callable[[Batch], Flops]) -> None:
        self._count = flops
        self._begin()

    def _begin(self) -> None:
        self._start = time.monotonic()
        self._impressions = self._tokens = self._flops = 0
        self._steps = 0
        self._waited = 0.0

    def count(self, impressions: int, micro_batches: list[Batch], waited: float) -> int:
        """One optimiser step: impressions of the whole global batch; micro-batches and seconds of waiting of this rank.

        Returns:
            The FLOPs of this rank.
        """
        self._impressions += impressions
        self._tokens += sum(batch.tokens for batch in micro_batches)
        flops = sum(self._count(batch).total for batch in micro_batches)
        self._flops += flops
        self._waited += waited
        self._steps += 1
        return flops

    def report(self, steps_left: int | None) -> dict[str, float]:
        """Rates since the last report, and seconds left at this pace if the steps left are known; starts anew."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        row = {
            "impressions_per_s": self._impressions / seconds,
            "tokens_per_s": self._tokens / seconds,
            "tflops": self._flops / seconds / 1e12,
            "data_wait": self._waited / seconds,
        }
        if steps_left is not None:
            row["seconds_left"] = max(0, steps_left) * seconds / max(1, self._steps)
        self._begin()
        return row


def progress_line(row: dict[str, Any], total: int | None) -> str:
    """One line for people, from a row of metrics; `total` steps, if that is known."""
    line = f"step {row['step']}{f'/{total}' if total is not None else ''} stage {row['stage']} loss {row['loss']:.4f} "
    line += f"{row['impressions_per_s']:.0f} impressions/s {row['tokens_per_s']:.0f} tokens/s data wait {row['data_wait']:.1%}"
    if "valid/auc" in row:
        line += f" valid AUC {row['valid/auc']:.4f}"
    if "seconds_left" in row:
        minutes, seconds = divmod(round(row["seconds_left"]), 60)
        line += f" left {minutes}:{seconds:02d}"
    return line
