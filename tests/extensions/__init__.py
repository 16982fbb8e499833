"""One file each of what others may add to the package, as they would write it."""
