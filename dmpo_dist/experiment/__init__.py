"""A study as one resumable command: a grid of settings, the models it needs, their evaluation, tables and pictures.

Like ``bench`` it uses ``commands`` for stages, evaluations and run folders, and only the command line uses it.
"""
