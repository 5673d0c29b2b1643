"""The operators in plain torch: the specification, and what runs everywhere."""
