"""Adapters and how they are stored: parameters, files, and the Hugging Face hub."""
