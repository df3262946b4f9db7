"""The base model: its files, and the partitioned model built from them."""
