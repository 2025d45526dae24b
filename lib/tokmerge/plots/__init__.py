"""Figures, drawn from saved tables and nothing else.

Here: one file per topic; `style` first. Not here: measuring or choosing what is drawn.
"""

from tokmerge.io.extras import require

require("all", "matplotlib")
