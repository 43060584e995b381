"""A run's rows in MLflow, sent by a thread of its own: a tracking server that is slow or gone costs the training nothing."""

import logging
import math
import os
import queue
import threading
import time
from typing import Any

from ctrsink import storage
from ctrsink.config.train import MlflowSpec
from ctrsink.errors import InputError, first_line
from ctrsink.run.folder import MLFLOW_NAME

METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # MLflow takes no more in one request
PATIENCE_S = 30
ROWS_KEPT = 10_000
log = logging.getLogger("ctrsink.train")


class MlflowRun:
    """The MLflow run of a run folder, taken up again when the run is; its id lies in `mlflow.run` there.

    A user and a password come from the environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN).
    Whatever fails afterwards is one warning; what was not sent is tried again with the next rows.

    Args:
        spec: where to.
        run_dir: the run's folder.
        name: of the MLflow run, when it is new.
        parameters: the configuration by dotted key, logged when it is new.

    Raises:
        InputError: the package mlflow is missing.
    """

    def __init__(self, spec: MlflowSpec, run_dir: str, name: str, parameters: dict[str, Any]) -> None:
        require_mlflow()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=spec.tracking_uri)
        self._experiment, self._name, self._parameters = spec.experiment, name, parameters
        self._id_path = storage.join(run_dir, MLFLOW_NAME)
        self._run_id: str | None = None
        self._queue: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._status = "FINISHED"
        self._warned = False
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def add(self, row: dict[str, Any]) -> None:
        """Send the finite numbers of a row soon; returns at once."""
        self._queue.put((round(time.time() * 1000), row))

    def close(self, finished: bool) -> None:
        """Send what is left, for half a minute at most, and mark the MLflow run as finished, or as killed: it can go on."""
        self._status = "FINISHED" if finished else "KILLED"
        self._queue.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._warn(f"the last rows were not taken within {PATIENCE_S} s")

    def _send_all(self) -> None:
        waiting: list[tuple[int, dict[str, Any]]] = []
        closing = False
        while not closing:
            item = self._queue.get()
            while item is not None:
                waiting.append(item)
                if self._queue.empty():
                    break
                item = self._queue.get()
            closing = item is None
            try:
                self._send(waiting)
                waiting = []
                if closing:
                    self._client.set_terminated(self._take_up(), self._status)
            except Exception as error:  # whatever a server or a plug-in of MLflow raises, training goes on
                self._warn(first_line(error))
                waiting = waiting[-ROWS_KEPT:]

    def _send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), moment, row["step"])
            for moment, row in rows
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        ]
        for part in _parts(metrics, METRICS_AT_ONCE):
            self._client.log_batch(self._take_up(), metrics=part)

    def _take_up(self) -> str:
        """The id of the MLflow run: that of before if the server still knows it, or a new one."""
        if self._run_id is None:
            self._run_id = self._known() or self._create()
            self._client.update_run(self._run_id, status="RUNNING")
        return self._run_id

    def _known(self) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            found = storage.read_bytes(self._id_path).decode().strip()
            return self._client.get_run(found).info.run_id
        except FileNotFoundError:
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _create(self) -> str:
        from mlflow.entities import Param

        known = self._client.get_experiment_by_name(self._experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(self._experiment)
        run_id = self._client.create_run(experiment, run_name=self._name).info.run_id
        storage.write_bytes(self._id_path, run_id.encode())
        for part in _parts(list(self._parameters.items()), PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in part])
        return run_id

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning("MLflow does not take the metrics, training goes on without it: %s", reason)
        self._warned = True


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def require_mlflow() -> None:
    """Refuse to begin without the package.

    Raises:
        InputError: it is missing.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of its use
    try:
        import mlflow  # noqa: F401
    except ImportError:
        raise InputError("train.mlflow needs the package mlflow: pip install 'ctrsink[mlflow]'") from None
