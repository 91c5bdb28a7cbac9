"""All figures: training curves, studies, intervals, explanations."""
