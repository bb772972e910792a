"""What the programs share: their command lines, recipes, finished runs and reports."""
