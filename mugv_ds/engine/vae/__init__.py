"""Training of the VideoVAE: its engines, its loss, its loop, and what it shows."""
