"""What a run leaves on disk, as typed models: written and read by the same code, and whole or not at all."""
