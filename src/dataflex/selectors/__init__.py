"""Methods that choose rows; those of one family are one file. ``_lib`` holds what several families share."""
