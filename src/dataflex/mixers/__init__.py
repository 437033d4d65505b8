"""Methods that set the proportions of domains, one file each."""
