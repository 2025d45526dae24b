"""Data sets behind two schemas: images with labels, and questions about images.

Here: where they come from, in which order, which part belongs to which split, what is trained on.
Not here: what a model makes of them; nothing of this folder knows of models or merging.
"""

from tokmerge.io.extras import require

require("data", "pandas")
