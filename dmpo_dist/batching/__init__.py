"""From token groups to packed rows, and from an epoch to every rank's micro-batches."""
