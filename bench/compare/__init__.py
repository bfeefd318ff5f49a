"""Every optimizer side by side: steps, memory, training steps, scaling."""
