"""Live models: the same passes on the graphs that Dynamo captures while a model generates or trains."""
