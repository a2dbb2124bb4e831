"""`python -m bench.report`: results as Markdown tables and SVG plots in `docs/`, and as the table in README.

No figure is typed by hand, none stands without its device, and what a CPU took is never shown as the speed of the
kernels.
"""
