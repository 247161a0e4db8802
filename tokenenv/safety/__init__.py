"""What comes from a file or a network is data: it is read, checked and shown, never run."""
