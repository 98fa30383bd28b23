"""What this process and its machine are: ambient state, memory, files, errors, text for terminals."""
