"""How activations leave a model, and the check that they are all of them."""
