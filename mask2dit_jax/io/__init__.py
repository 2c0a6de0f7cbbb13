"""Files, paths and caches, local or in a bucket."""
