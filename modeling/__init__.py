"""What the network is: a decoder whose every part can be swapped; flat, one idea per file."""
