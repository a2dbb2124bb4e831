"""What the verbs of the command run."""
