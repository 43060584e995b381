"""Events of one request were shown together: none of them was known when the others were."""

import numpy as np
import pyarrow as pa


def known_events(requests: pa.StringArray, lengths: np.ndarray) -> np.ndarray:
    """How many events of its user come before the request of each event, int32 [N].

    Args:
        requests: of events of any number of users, [N], oldest first in each; an event without one stands alone.
        lengths: events of each user, int [users], N in all.
    """
    users = np.repeat(np.arange(len(lengths)), lengths)
    firsts = np.arange(len(requests))
    coded = requests.dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy()
    asked = np.flatnonzero(codes >= 0)
    # Events of one user and one request meet in the place of the first of them.
    _, where, inverse = np.unique(users[asked] * len(coded.dictionary) + codes[asked], return_index=True, return_inverse=True)
    firsts[asked] = asked[where][inverse]
    return (firsts - (np.cumsum(lengths) - lengths)[users]).astype(np.int32)
