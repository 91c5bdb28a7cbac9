"""Distributed Direct Multi-Preference Optimization (DMPO) for LLM recommenders."""

__version__ = "0.1.0"
