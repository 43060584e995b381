"""All ranks of a run read the data set that the run was claimed for, or none begins."""

import hashlib

import numpy as np

from ctrsink import storage
from ctrsink.config import RunSpec
from ctrsink.dataset.manifest import Manifest
from ctrsink.dist import Topology, gather_rows
from ctrsink.errors import InputError
from ctrsink.run.folder import DATA_NAME, identities


def require_same_data(spec: RunSpec, manifest: Manifest, topology: Topology) -> None:
    """Refuse to begin where ranks read different data sets, or another than the run was claimed for; all ranks raise, or none.

    Raises:
        InputError: somebody appended to the data set, or replaced it, in between.
    """
    found = [manifest.identity]
    claim = storage.join(spec.run_dir, DATA_NAME)
    if topology.is_first and storage.exists(claim):
        claimed = storage.read_bytes(claim).decode()
        if claimed not in identities(spec, manifest):
            found.append(claimed)
    # Words of a hash go through fp64 unharmed.
    words = [np.frombuffer(hashlib.sha256(identity.encode()).digest(), np.uint32) for identity in found]
    rows = gather_rows(np.array(words, np.float64), topology)
    if (rows != rows[0]).any():
        raise InputError(f"the data set {spec.data.uri} was changed while the run was starting: start it again")
