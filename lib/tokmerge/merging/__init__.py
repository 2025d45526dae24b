"""What merges with whom: packed batches, matching, policies, and how they are measured and written down.

Works on tensors alone. Models and their internals, images, files of studies: not here.
"""
