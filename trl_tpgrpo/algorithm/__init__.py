"""The equations: tensors in, tensors out. Nothing here imports the rest of the package."""
