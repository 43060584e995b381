"""Start a run where its configuration says."""

from contextlib import suppress
from typing import Any

from ctrsink.config import RunSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.errors import InputError, RunError
from ctrsink.families.facts import Facts
from ctrsink.run.folder import claim, identities, release, require_new
from ctrsink.run.presence import held
from ctrsink.runtime.library_log import kept, take_back
from ctrsink.runtime.preflight import check
from ctrsink.runtime.process import stay_on_loopback
from ctrsink.runtime.reach import cluster_address


def start(spec: RunSpec, resume: bool = False, stop_after: int | None = None) -> dict[str, Any]:
    """Check, claim the run's folder, train, evaluate; see Trainer.run.

    Raises:
        InputError: something about the data, the model or the run's folder is wrong, or somebody trains the run already.

    A new run that ends before its first step, for whatever reason, leaves nothing behind.
    """
    if not resume:
        require_new(spec.run_dir)
    if spec.runtime.kind == "ray":
        cluster_address(spec.runtime.address)  # asked here, too: before torch is imported
    facts = check(spec)
    with held(spec.run_dir) as last_held:
        new = claim(spec, resume, identities(spec, read_manifest(spec.data.uri)))
        try:
            with kept(spec.run_dir):
                return _train(spec, facts, stop_after)
        except BaseException:
            with suppress(InputError, RunError, OSError):  # what ended the run is told
                if new and last_held():
                    take_back(spec.run_dir)
                    release(spec.run_dir)
            raise


def _train(spec: RunSpec, facts: Facts, stop_after: int | None) -> dict[str, Any]:
    if spec.runtime.kind == "local":
        from ctrsink.runtime.local import train_local

        return train_local(spec, facts, stop_after)
    stay_on_loopback(spec.runtime.address)
    from ctrsink.runtime.ray_train import train_ray

    return train_ray(spec, facts, stop_after)
