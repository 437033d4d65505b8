"""Methods that choose rows, one file each."""
