"""Save a run so that it can go on, on any number of ranks: only what trains, O(K)."""
