"""What a run tells about itself: the metrics file, memory, and the tables."""
