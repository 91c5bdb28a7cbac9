"""From interactions to preference groups: sources, splits, negatives, templates, tokens."""
