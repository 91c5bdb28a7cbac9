"""Recipes (YAML layers); this file makes the folder readable through importlib.resources."""
