"""Start a run where its configuration says."""

from typing import Any

from ctrsink.config import RunSpec
from ctrsink.runtime.preflight import prepare_run


def start(spec: RunSpec, resume: bool = False, stop_after: int | None = None) -> dict[str, Any]:
    """Check, claim the run's folder, train, evaluate; see Trainer.run.

    Raises:
        InputError: something about the data, the model or the run's folder is wrong; nothing was started.
    """
    vocabulary = prepare_run(spec, resume)
    if spec.runtime.kind == "local":
        from ctrsink.runtime.local import train_local

        return train_local(spec, vocabulary, stop_after)
    from ctrsink.runtime.ray_train import train_ray

    return train_ray(spec, vocabulary, stop_after)
