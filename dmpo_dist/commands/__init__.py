"""What each verb of the command line does: train, evaluate, rank, explain, export."""
