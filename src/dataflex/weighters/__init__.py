"""Methods that say how much a sample or token counts, one file each."""
