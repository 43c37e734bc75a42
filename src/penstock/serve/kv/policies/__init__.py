"""What the cache of a running sequence keeps."""
