"""DFlash 2: DFlash with convolutions inside a block and a selector that chooses among the head's candidates."""
