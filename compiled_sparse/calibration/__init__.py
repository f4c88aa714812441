"""Choice of windows from measured losses, and the files that hold losses and choices."""
