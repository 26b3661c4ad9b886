"""Looks at checkpoints and plans deployments; no model is built."""
