"""Saving, finding and parameters.

Here: where things are, tables, JSON and tensors on disk, resumable pieces, a notebook's parameters.
Not here: what any of it means; nothing of this folder knows of images, models or merging.
"""
