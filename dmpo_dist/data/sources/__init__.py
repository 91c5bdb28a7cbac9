"""Readers: one per kind of log or of ready preference rows, and the simulator."""
