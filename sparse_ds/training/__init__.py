"""Wires everything: the Trainer subclass, its callbacks, and one run from configuration to files."""
