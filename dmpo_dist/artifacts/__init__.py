"""What a run leaves on disk, as typed models: written and read by the same code, each file or folder whole or not at all."""
