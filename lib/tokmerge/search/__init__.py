"""What to try next: spaces of operating points, the optimiser, its baselines, and which trials are worth having.

Not here: what a trial measures and where it runs (`evaluation`), and how a policy merges (`merging`).
"""

from tokmerge.io.extras import require

require("search", "pandas", "pymoo")
