"""Adapters to the trainers people use; each module imports its trainer when it is itself imported."""
