"""An audit as a page for people and as a table on the console."""
