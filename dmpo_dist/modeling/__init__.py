"""Backbone, attention over shared prompts, log-probabilities, policy and reference."""
