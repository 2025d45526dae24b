"""What an eavesdropper can rebuild of the images.

Here: defences, attackers, the judge of what they rebuild, and measures of what leaks.
Not here: how tokens merge or travel; nothing of this folder knows of channel or search.
"""

from tokmerge.io.extras import require

require("privacy", "pandas", "piq")
