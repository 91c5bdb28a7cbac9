"""Whether a run fits and how long it takes, from the model's config.json alone."""
