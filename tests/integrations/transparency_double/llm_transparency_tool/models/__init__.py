"""What the graphs are built from."""
