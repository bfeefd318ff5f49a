"""Where the time of a step goes, by batch and phase."""
