"""DFlash 2: DFlash with convolutions inside a block and a selector among the head's candidates."""
