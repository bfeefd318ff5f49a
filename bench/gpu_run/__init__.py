"""A run on a GPU machine in stages, each within its own time; and the bundle that prepares one without a GPU."""
