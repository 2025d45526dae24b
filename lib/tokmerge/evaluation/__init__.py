"""What a model scores and what it takes: images, questions, payloads, time; over processes and machines.

Not here: how models merge and answer (`models`), what is tried next (`search`), what the air does (`channel`).
"""

from tokmerge.io.extras import require

require("data", "pandas")
