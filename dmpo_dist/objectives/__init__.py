"""What training minimises: the ``Loss`` protocol, the likelihood (SFT), and a file for each preference objective."""
