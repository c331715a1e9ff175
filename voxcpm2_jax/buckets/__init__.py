"""Buckets: gs:// and s3:// wherever a file or a directory is named. See the guide of training runs, "Buckets"."""
