"""The sparse layer: where the active weights lie, and a linear layer that trains only them."""
