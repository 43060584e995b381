"""One way to open, list and put files on local disk and s3://; S3 credentials come from the environment only."""
