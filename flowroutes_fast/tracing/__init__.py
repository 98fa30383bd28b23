"""From a model and a text to a trace: prompts, importances, memory, resumable runs."""
