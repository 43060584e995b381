"""Several hosts on one Linux machine: network namespaces with a Ray node each and an S3 server, whose links can be cut."""
