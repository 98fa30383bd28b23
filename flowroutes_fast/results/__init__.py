"""What a forward pass gave: traces, routes, their edges, flow and files."""
