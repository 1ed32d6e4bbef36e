"""The two stages of the paper: what trains, on what, and the loop."""
