"""DeepSpeed configurations; this file makes the folder readable through importlib.resources."""
