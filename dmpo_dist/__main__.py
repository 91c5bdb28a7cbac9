"""``python -m dmpo_dist`` is ``dmpo``, for torchrun and srun."""

from dmpo_dist.cli import main

main()
