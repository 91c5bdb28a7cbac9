"""How fast and how small the shared-prefix step is, against separate rows and against TRL's DPOTrainer."""
