"""Prepare or append the log of a configuration, in this process or with Ray Data."""

from ctrsink import storage
from ctrsink.config import RunSpec
from ctrsink.config.data import PrepareSpec
from ctrsink.dataset.manifest import Manifest, read_manifest, require_none
from ctrsink.prepare.check_rows import OnBadRow
from ctrsink.prepare.execute import Execute, in_process
from ctrsink.prepare.sources.files import require_there
from ctrsink.runtime.process import stay_on_loopback


def prepare_run(spec: RunSpec, to: str | None, on_bad_row: OnBadRow, overwrite: bool) -> Manifest:
    """Prepare the log of `spec.prepare`, which must be there, as the data set `to`, else `spec.data.uri`; see build.prepare."""
    if not overwrite:
        require_none(to or spec.data.uri)
    section, to, execute = _place(spec, to)
    from ctrsink.prepare.build import prepare  # imports torch: what can be refused without is refused before

    return prepare(section, to, on_bad_row, overwrite, execute)


def append_run(spec: RunSpec, to: str | None, on_bad_row: OnBadRow) -> Manifest:
    """Append the log of `spec.prepare`, which must be there, to the data set `to`, else `spec.data.uri`; see build.append."""
    read_manifest(to or spec.data.uri)
    section, to, execute = _place(spec, to)
    from ctrsink.prepare.build import append

    return append(section, to, on_bad_row, execute)


def _place(spec: RunSpec, to: str | None) -> tuple[PrepareSpec, str, Execute]:
    section, to = spec.prepare, to or spec.data.uri
    assert section is not None
    for log in (section.source.path, section.source.items):
        if log is not None:
            require_there(log)
    if section.workers == 1:
        return section, to, in_process
    stay_on_loopback(spec.runtime.address)
    from ctrsink.runtime.ray_data import ray_data

    # Ray's workers run in folders of their own: local paths become absolute.
    source = section.source
    places = {"path": storage.absolute(source.path), "items": source.items and storage.absolute(source.items)}
    section = section.model_copy(update={"source": source.model_copy(update=places)})
    return section, storage.absolute(to), ray_data(spec.runtime.address, section.workers)
