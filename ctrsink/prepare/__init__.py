"""From the raw log to a data set: blocks of the log -> slices by user -> shards, by tasks whose results are kept to the end."""
