"""A study as one resumable command: a grid of settings, the models it needs, their evaluation, tables and pictures.

It stands beside ``bench``: above ``commands``, whose stages, evaluations and run folders it calls and which knows
nothing of it, and below the command line.
"""
