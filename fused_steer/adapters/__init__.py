"""What an adapter is and how it is kept: its parameters, its two files, its page on the hub."""
