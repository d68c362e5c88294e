"""From tensors to a program: configuration, layers, cache. Never opens a path."""
