"""Data: what people pass, as samples that a model takes, in batches."""
