"""Everything that is drawn: training curves, studies, explanations."""
