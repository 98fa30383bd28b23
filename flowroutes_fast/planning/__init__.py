"""What a trace will take, before it is made."""
