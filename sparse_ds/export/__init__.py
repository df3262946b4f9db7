"""What a user keeps: the adapter (indices and values) and the merged dense checkpoint."""
