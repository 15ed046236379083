"""`diffusion doctor`: a module for each thing that may be wrong, and `checks.py`, the list of them."""
