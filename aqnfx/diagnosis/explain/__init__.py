"""Why: a sensitivity map joined with the structure of its model."""
