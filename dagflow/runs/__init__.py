"""Runs that are in a store: which there are, whether they are whole, and how their weights get out."""
