"""Talking to a model: in the terminal, and in a page of the browser."""
