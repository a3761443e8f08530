"""``privtune compare``: many methods on the same text, one table and the figures to choose by."""
