"""`dmpo tune`: settings searched on the validation requests, of a stage and of the baselines beside it."""
