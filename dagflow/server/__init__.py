"""Serving: a deployment behind an OpenAI-compatible HTTP interface, a page, and a terminal."""
