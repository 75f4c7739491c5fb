"""Loss functions and modules."""
