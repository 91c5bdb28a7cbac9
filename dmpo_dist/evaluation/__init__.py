"""From scores of candidates to metrics, baselines and a report."""
