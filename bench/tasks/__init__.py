"""One file a benchmark task."""
