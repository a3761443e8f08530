"""What a run leaves behind: its folder, records, figure and table."""
