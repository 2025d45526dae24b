"""Tokens over a noisy channel, from the device's bytes to the server's answer.

Here: symbols and codes, lost blocks, who competes for the channel, and a device and a server that really talk.
Not here: the payload's bytes (`tokmerge.wire`), and how tokens merge.
"""

from tokmerge.io.extras import require

require("channel", "pandas", "sionna")
