"""The format of xAI's open release."""
