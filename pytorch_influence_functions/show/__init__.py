"""What do people look at? Results and pictures."""
