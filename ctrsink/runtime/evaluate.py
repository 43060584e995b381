"""Measure a run's model: in this process, or where its configuration, with other values for some keys, says."""

from ctrsink.config.load import with_overrides
from ctrsink.config.train import Split
from ctrsink.errors import InputError
from ctrsink.run.folder import first_difference, read_run
from ctrsink.run.listing import Step

Metrics = dict[str, dict[str, float]] | dict[str, dict[str, float | None]]


def evaluate(run_dir: str, overrides: list[str], splits: tuple[Split, ...], step: Step) -> Metrics:
    """Metrics by split of the run's checkpoint `step` (default: the latest), also written to `evaluation/` in the run's folder.

    Args:
        overrides: of the run's configuration, `section.key=value`, such as where it runs. With any, the model is computed as in
            training, by the workers of `runtime`, in the run's precision; without, in this process, on the CPU and in fp32.

    Raises:
        InputError: an override is wrong, or changes what the run computes; see evaluate_together and evaluate_run.
    """
    trained = read_run(run_dir)
    if not overrides:
        from ctrsink.train.measure import evaluate_run

        return evaluate_run(run_dir, splits, step)
    spec = with_overrides(trained, overrides, run_dir)
    if (difference := first_difference(trained, spec)) is not None:
        raise InputError(f"{run_dir} is measured as it was trained: {difference}; leave that override out")
    spec = spec.model_copy(
        update={
            "run_dir": run_dir,
            "evaluate": spec.evaluate.model_copy(update={"splits": splits}),
            "train": spec.train.model_copy(update={"mlflow": None}),  # nothing is reported there
        }
    )
    from ctrsink.runtime.preflight import check

    if spec.runtime.kind == "local":
        from ctrsink.runtime.local import evaluate_local

        return evaluate_local(spec, check(spec), step)
    from ctrsink.runtime.process import stay_on_loopback
    from ctrsink.runtime.reach import cluster_address

    cluster_address(spec.runtime.address)
    facts = check(spec)
    stay_on_loopback(spec.runtime.address)
    from ctrsink.runtime.ray_train import evaluate_ray

    return evaluate_ray(spec, facts, step)
