"""What an attribute's metadata says of a key of the run file. Knows no key."""

from __future__ import annotations

# Marks an attribute that is no key of the run file: loading puts a plugin's options object there.
FILLED_IN = {"key": False}
# Marks a key that changes no result beyond rounding: it may change under the results of a stage. Every other key that a
# stage reads counts.
CHANGES_NOTHING = {"results": False}
