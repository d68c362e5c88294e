"""Jinja templates under a budget: jinja2 parses, this room evaluates. Knows nothing of chats."""
