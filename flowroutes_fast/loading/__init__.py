"""Models and weights from disk: whole, converted, or a layer at a time."""
