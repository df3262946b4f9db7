"""Drop-and-grow events under ZeRO-3: every rank, on every world size, ends with the same indices."""
