"""`python -m bench.report`: turns results into Markdown tables and SVG plots in `docs/`, and into README's tables.

No figure is typed by hand. Every figure names its device. A CPU's time is never shown as the speed of the kernels.
"""
