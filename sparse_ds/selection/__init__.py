"""Which weights are active: schedule, first choice, drop and grow. Functions of local tensors, never a collective."""
