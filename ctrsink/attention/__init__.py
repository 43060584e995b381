"""Who sees whom in a packed row, and the backends that compute it."""
