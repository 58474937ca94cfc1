"""Talking to a model: in the terminal (`session`), over HTTP (`app`), and what both read (`loading`, `media`)."""
