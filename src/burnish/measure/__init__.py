"""Measuring: quality, speed and memory, the comparison of a child with its parent, and the report that shows them."""
