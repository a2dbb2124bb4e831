"""`python -m bench.sweep --out DIR`: time every candidate layout of the op on this GPU, and print the best ones.

`kernels/schedule.py` chooses a layout by rules and tables that were read off such a run.
"""
