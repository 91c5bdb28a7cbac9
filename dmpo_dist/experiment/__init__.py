"""A study as one resumable command: a grid of settings, the models it needs, their evaluation, tables and pictures."""
